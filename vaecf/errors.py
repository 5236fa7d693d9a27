"""The one error type whose message is meant for the person at the keyboard."""


class VaecfError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and the mend.

    Entry points print it as ``error: <message>`` and exit with status 2;
    library users catch it as the ``ValueError`` that it is.
    """
