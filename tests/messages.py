"""What the tests of messages share."""

import re


def mentions(words):
    """A regular expression that finds all words, in any order."""
    return "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)
