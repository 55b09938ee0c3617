"""Systems: one file each, a class of recipes that says how its modules are built, begun and saved."""
