"""The command line: one table from verb to function, what each verb takes, and how it looks."""
