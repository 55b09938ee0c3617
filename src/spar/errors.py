"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Bad input from the user: a file, a prompt, a setting.

    The message is one sentence that says what was expected and what came. The CLI prints it and exits with status 2.
    """
