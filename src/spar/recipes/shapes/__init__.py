"""The shapes world as a recipe: the whole of SPAR from random weights on two CPU cores."""
