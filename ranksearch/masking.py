"""Addresses and messages without the passwords in them: they are shown, logged and kept; passwords are not."""

import re

# Up to the last @, since passwords that nobody encoded hold slashes and @ themselves.
_USER = re.compile(r"(?<=://)[^\s'\"<>]*@")
_SETTING = re.compile(r"([?&;][^=&;\s]*(?:passw|pwd|secret|token|key)[^=&;\s]*=)[^&;\s'\"]*", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with `***` for who logs in, and for what is set to log in, in every address of it."""
    return _SETTING.sub(r"\1***", _USER.sub("***@", text))


def public_address(url: str) -> str:
    """The address as a browser is given it, which asks itself who logs in."""
    return _USER.sub("", url)


def cause(error: Exception) -> Exception | None:
    """What an error of ours is raised `from`: nothing where a traceback of the other would tell a password."""
    return error if masked(str(error)) == str(error) else None
