import pytest

from gpt1_jax.text.gutenberg import strip_gutenberg

BODY = "CHAPTER I\n\nEmma Woodhouse, handsome, clever, and rich,\nhad lived nearly twenty-one years.\n\nFINIS"
LICENCE = "Section 1. General Terms of Use and Redistributing Project Gutenberg(TM) works\n" * 50
SMALL_PRINT = (
    "**The Project Gutenberg Etext of Emma, by Jane Austen**\n\nCopyright laws are changing all over the world.\n\n"
    '***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy is this "Small Print!" statement here?\n'
    + "You know: lawyers. They tell us you might sue us if there is something wrong.\n"
    * 100
)


@pytest.mark.parametrize(
    "text",
    [
        # 2021 and after
        "The Project Gutenberg eBook of Emma\n\nTitle: Emma\n\nLanguage: English\n\n"
        f"*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n{BODY}\n\n"
        f"*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nUpdated editions will replace the previous.\n{LICENCE}",
        # about 2008, with a line of words before that of asterisks, and a title over two lines
        "Project Gutenberg's Emma, by Jane Austen\n\nTitle: Emma\n\n"
        f"*** START OF THIS PROJECT GUTENBERG EBOOK EMMA; OR, THE\nMATCHMAKER ***\n\n\n{BODY}\n\n\n"
        "End of the Project Gutenberg EBook of Emma, by Jane Austen\n\n"
        f"*** END OF THIS PROJECT GUTENBERG EBOOK EMMA ***\n\n{LICENCE}*** END: FULL LICENSE ***\n",
        # about 2004, no space after the asterisks
        f"The Project Gutenberg EBook of Emma\n\n***START OF THE PROJECT GUTENBERG EBOOK EMMA***\n\n\n{BODY}\n\n\n"
        f"***END OF THE PROJECT GUTENBERG EBOOK EMMA***\n\n***** This file should be named 158.txt *****\n{LICENCE}",
        # the nineties
        f"{SMALL_PRINT}*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n\n{BODY}\n\n\n"
        "End of Project Gutenberg's Etext of Emma, by Jane Austen\n",
        f"{SMALL_PRINT}*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n{BODY}\n\n"
        "The End of the Project Gutenberg Etext of Emma\n\n",
        # both kinds of start
        f"*** START OF THE PROJECT GUTENBERG EBOOK, EMMA ***\n\n{SMALL_PRINT}"
        f"*END*THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*\n\n{BODY}\n\n"
        f"*** END OF THE PROJECT GUTENBERG EBOOK, EMMA ***\n{LICENCE}",
        # the small print behind the book
        f"*** START OF THE PROJECT GUTENBERG EBOOK, EMMA ***\n{BODY}\n\n" + SMALL_PRINT.split("\n\n")[-1],
        # a book under copyright, in small letters, with the line ends of Windows
        f"***Start of the copyrighted Project Gutenberg Etext of Emma***\r\n\r\n{BODY}\r\n\r\n"
        "***End of this copyrighted Project Gutenberg Etext***\r\n",
        # one of the two markers
        f"{BODY}\n\nEND OF THIS PROJECT GUTENBERG EBOOK EMMA\n",
        f"*** START OF THIS PROJECT GUTENBERG EBOOK EMMA\n\n{BODY}\n",
    ],
    ids=["2021", "2008", "2004", "1993", "1993b", "both", "behind", "copyright", "end", "start"],
)
def test_the_book_is_what_is_left(text: str):
    assert strip_gutenberg(text) == BODY


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        "  white space stays \n",
        "He read that the end of Project Gutenberg was near, and *** START OF THE PROJECT GUTENBERG EBOOK ***.",
        "*** CHAPTER I ***\n\nStart of the project. Gutenberg was a printer.",
        "a line of a long book\n" * 2000 + "*** START OF THE PROJECT GUTENBERG EBOOK, quoted late ***\nmore",
    ],
)
def test_a_text_without_markers_at_their_place_is_unchanged(text: str):
    assert strip_gutenberg(text) == text
