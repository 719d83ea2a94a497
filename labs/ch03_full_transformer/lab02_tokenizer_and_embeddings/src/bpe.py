"""Byte-level byte-pair encoding: GPT-2's alphabet and pieces, training, encoding, decoding.

Sources: Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units",
algorithm 1, arXiv:1508.07909; Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.2 (bytes instead of characters).

A token is a string of alphabet characters, each of which stands for one byte. A pair is two tokens
side by side, (left, right). Merges are pairs in the order in which training found them.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import regex

# GPT-2's pieces, in this order of preference: an English ending after an apostrophe; letters; digits; other
# signs, each of these three with one space before it if there is one; white space up to the last of
# it before a word; the rest of the white space. Python's own `re` does not know \p{L} (any letter)
# and \p{N} (any number).
SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

Pair = tuple[str, str]

# --- Part 1: from text to pieces ----------------------------------------------------------------


def bytes_to_unicode() -> dict[int, str]:
    """Return GPT-2's alphabet: for every byte, 0 to 255, one character that can be printed.

    Bytes 33 to 126, 161 to 172 and 174 to 255 stand for the character of the same number: "A" for 65.
    The 68 others, in increasing order, stand for the characters 256, 257, ..., 323: byte 0 is "Ā"
    (256), and the space, byte 32, is "Ġ" (288).
    """
    # YOUR CODE HERE
    # Collect the bytes that keep their number; range(33, 127) is the first of the three runs.
    # Then go through all 256 bytes in order; each that is not among them takes the next number
    # from 256 on. chr(n) makes the character.
    raise NotImplementedError("a character for each of the 256 bytes")


def pre_tokenize(text: str) -> list[str]:
    """Cut `text` into pieces by SPLIT and write each piece in the alphabet, byte by byte.

    Merges never cross from one piece to the next.

    Args:
        text: any text that UTF-8 can write; it may be empty.

    Returns:
        The pieces in order. "Hi é" gives ["Hi", "ĠÃ©"]: the space is one byte, the é two.
    """
    # YOUR CODE HERE
    # SPLIT.findall(text) cuts, and loses nothing: every character is in exactly one piece. A piece becomes
    # bytes by .encode("utf-8"), and every byte its character of the alphabet. Cut first, then encode: the
    # pattern speaks about letters, not about bytes.
    raise NotImplementedError("cut into pieces, and write their bytes in the alphabet")


# --- Part 2: training ---------------------------------------------------------------------------


def merge_pair(symbols: Sequence[str], pair: Pair) -> list[str]:
    """Join every occurrence of `pair` in `symbols`, from left to right.

    Occurrences that overlap are joined from the left: ("a", "a") in a a a gives aa a.

    Args:
        symbols: the tokens of one piece. They are not modified.
        pair: two tokens.

    Returns:
        The tokens after the merge, a new list. What was joined in this call is not joined again in it.
    """
    # YOUR CODE HERE
    # Walk along with an index into `symbols`. Where the token and its right neighbour are the pair, write
    # one joined token and go on two places; else copy one token and go on one place. Careful at
    # the last token: it has no neighbour.
    raise NotImplementedError("replace every occurrence of the pair by one token")


def vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Return the id of every token.

    Ids 0 to 255 are the characters of the alphabet, sorted by their number in Unicode (their code
    point), not by the byte they stand for: "!" is 0, "A" is 32, and the space "Ġ" is 220. Id 256
    is what the first merge makes, 257 what the second makes, and so on.

    Args:
        merges: as `train` returns them.
    """
    # YOUR CODE HERE
    # Make one list of all tokens, in the order of their ids, and number it with enumerate.
    # sorted() puts characters in the order of their code points. A merge makes left + right.
    raise NotImplementedError("number the alphabet, then the merged tokens")


def train(text: str, vocab_size: int) -> list[Pair]:
    """Learn merges from `text`.

    All pieces start as single characters. Then, until the vocabulary has `vocab_size` tokens or no piece
    has two tokens left: find the pair that occurs most often, join it in every piece, note it down.

    An occurrence is a place i with tokens i and i + 1 of one piece equal to the pair; places may
    overlap, so a a a has two of ("a", "a"). Pieces that occur n times in the text count n
    times. A pair that occurs once may be merged too. Of pairs that occur equally often,
    the one whose left token has the smaller id wins, and with equal left tokens the one whose
    right token has the smaller id. Ids are those of `vocabulary`.

    Args:
        text: the training text; it may be empty.
        vocab_size: how many tokens the vocabulary is to have, at least 256.

    Returns:
        Merges in the order they were found: vocab_size - 256 of them, or fewer when the text has no more.

    Raises:
        ValueError: if `vocab_size` is less than 256.
    """
    # YOUR CODE HERE
    # First the plain loop: Counter(pre_tokenize(text)), count all pairs, min() with a key for the ties, merge
    # everywhere, repeat. It passes every test except the slow one. Then the fast one: keep the counts,
    # and for each pair the set of pieces it is in, so that a merge only touches those; take their old
    # pairs off the counts and add their new ones. A heap of (-count, left id, right id) finds the best pair;
    # counts in it may be out of date, so compare with the true one when an entry comes out.
    raise NotImplementedError("merge the most frequent pair, again and again")


# --- Part 3: the tokenizer ----------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back.

    Attributes:
        ids: the id of every token, as `vocabulary` gives it.
        tokens: the other direction: tokens[i] is the token with id i.
        ranks: for every pair that was merged, its place in the merges, from 0.
    """

    def __init__(self, merges: Sequence[Pair]) -> None:
        """Build a tokenizer from `merges`, as `train` returns them; they are not modified."""
        self.ids = vocabulary(merges)
        self.tokens = list(self.ids)
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`.

        In every piece, starting from single characters: of the pairs that are there now, join the one
        that was merged first in training; repeat until no pair of the piece is among the merges.

        Args:
            text: any text that UTF-8 can write; it may be empty, then so is the list.
        """
        # YOUR CODE HERE
        # For each piece: tokens = list(piece). While there are pairs (itertools.pairwise), take the one with the
        # smallest rank; a pair that is no merge has rank infinity, and if that is the smallest, stop.
        # merge_pair joins all its occurrences. Then look up the ids. A piece may be long: do not rebuild
        # more than you must, and note that equal pieces have equal ids.
        raise NotImplementedError("merge each piece in the order of training, then look up ids")

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`.

        The bytes of all tokens are put together before they are read as UTF-8, because one
        character may be spread over several tokens. What is no valid UTF-8 is read as U+FFFD, the
        replacement character, as by bytes.decode with errors="replace".

        Args:
            ids: any ids of the vocabulary, in any order; they need not come from `encode`.

        Raises:
            ValueError: if an id is not in the vocabulary, below 0 or too large.
        """
        # YOUR CODE HERE
        # You need the alphabet the other way round: from character to byte. Join the tokens to one
        # string, turn it into one bytes object, and decode that once. A list accepts the index -1:
        # check ids before you look them up.
        raise NotImplementedError("ids to tokens, tokens to bytes, bytes to text")
