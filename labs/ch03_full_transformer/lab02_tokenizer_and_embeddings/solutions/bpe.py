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
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def pre_tokenize(text: str) -> list[str]:
    """Cut `text` into pieces by SPLIT and write each piece in the alphabet, byte by byte.

    Merges never cross from one piece to the next.

    Args:
        text: any text that UTF-8 can write; it may be empty.

    Returns:
        The pieces in order. "Hi é" gives ["Hi", "ĠÃ©"]: the space is one byte, the é two.
    """
    alphabet = bytes_to_unicode()
    return ["".join(alphabet[byte] for byte in piece.encode("utf-8")) for piece in SPLIT.findall(text)]


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
    left, right = pair
    merged, i, last = [], 0, len(symbols) - 1
    while i <= last:
        if i < last and symbols[i] == left and symbols[i + 1] == right:
            merged.append(left + right)
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Return the id of every token.

    Ids 0 to 255 are the characters of the alphabet, sorted by their number in Unicode (their code
    point), not by the byte they stand for: "!" is 0, "A" is 32, and the space "Ġ" is 220. Id 256
    is what the first merge makes, 257 what the second makes, and so on.

    Args:
        merges: as `train` returns them.
    """
    tokens = [*sorted(bytes_to_unicode().values()), *(left + right for left, right in merges)]
    return {token: i for i, token in enumerate(tokens)}


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
    ids = vocabulary([])
    if vocab_size < len(ids):
        raise ValueError(f"a vocabulary has at least the {len(ids)} bytes, {vocab_size} tokens are too few")
    pieces = Counter(pre_tokenize(text))
    words, times = [list(piece) for piece in pieces], list(pieces.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # in which words a pair is, or once was
    for w, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += times[w]
            places[pair].add(w)

    def entry(pair: Pair) -> tuple[int, int, int, Pair]:
        return -counts[pair], ids[pair[0]], ids[pair[1]], pair

    # A merge only ever lowers counts of pairs that were there before it. So an entry may promise too
    # much, but never too little: if the first one is true, it is the best.
    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(ids) < vocab_size:
        promised, *_, best = heapq.heappop(heap)
        if counts[best] != -promised:
            if counts[best] > 0:
                heapq.heappush(heap, entry(best))
            continue
        merges.append(best)
        new = best[0] + best[1]
        ids[new] = len(ids)
        made = set()
        for w in places.pop(best):
            for pair in pairwise(words[w]):
                counts[pair] -= times[w]
            words[w] = merge_pair(words[w], best)
            for pair in pairwise(words[w]):
                counts[pair] += times[w]
                if new in pair:
                    places[pair].add(w)
                    made.add(pair)
        for pair in made:
            heapq.heappush(heap, entry(pair))
    return merges


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
        ids: list[int] = []
        known: dict[str, list[int]] = {}  # equal pieces have equal ids
        for piece in pre_tokenize(text):
            if piece not in known:
                tokens, never = list(piece), len(self.ranks)
                while len(tokens) > 1:
                    first = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, never))
                    if first not in self.ranks:
                        break
                    tokens = merge_pair(tokens, first)
                known[piece] = [self.ids[token] for token in tokens]
            ids += known[piece]
        return ids

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
        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        data = bytearray()
        for i in ids:
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"id {i} is not in the vocabulary of {len(self.tokens)} tokens")
            data.extend(byte_of[char] for char in self.tokens[i])
        return data.decode("utf-8", errors="replace")
