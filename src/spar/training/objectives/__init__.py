"""What stages train on: one file an objective, a frozen dataclass of exactly the weights that it reads."""
