"""Books of Project Gutenberg without the header and the licence around them."""

import re

# A header is announced and closed by a line. The title in it may run over several lines, up to the closing asterisks.
# Until 2003 or so the header held the licence, "the small print", and a line of its own ended that.
_START = re.compile(
    r"^[ \t]*(?:\*{3} ?START OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG(?:[^*]{0,500}\*{3}|.*)"
    r"|\*END ?\*? ?THE SMALL PRINT.*)",
    re.IGNORECASE | re.MULTILINE,
)
# "End of Project Gutenberg's Emma, by Jane Austen" often stands before the line of asterisks. A licence at the end of
# an old file has no such line, but begins with the small print.
_END = re.compile(
    r"^[ \t]*(?:(?:\*{3} ?)?(?:THE |THIS IS THE )?END OF (?:THE |THIS )?(?:COPYRIGHTED )?PROJECT GUTENBERG"
    r"|\*{3}START\*\*THE SMALL PRINT)",
    re.IGNORECASE | re.MULTILINE,
)
_HEADER_CHARS = 30_000  # the longest headers, with the licence in them, have about half


def strip_gutenberg(text: str) -> str:
    """The text between the markers of Project Gutenberg, in any of their forms since 1993; all of it without them.

    A header is looked for in the first 30,000 characters; if several lines could end it, the last one does.
    """
    start = max((found.end() for found in _START.finditer(text, 0, _HEADER_CHARS)), default=0)
    end = _END.search(text, start)
    return text[start : end.start() if end else None].strip() if start or end else text
