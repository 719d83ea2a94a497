"""Tests of ch03/lab02, the tokenizer. Oracle: Hugging Face's `tokenizers`, trained on the same text."""

import json
import os
import random
import unicodedata
from functools import cache

import pytest
import tokenizers
from bpe import Tokenizer, bytes_to_unicode, merge_pair, pre_tokenize, train, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # so that it does not warn of forks

bounded = settings(deadline=None, max_examples=80, database=None, derandomize=True)

FAMILY = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"  # one picture: three people joined by two ZWJ
FLAG = "\N{REGIONAL INDICATOR SYMBOL LETTER I}\N{REGIONAL INDICATOR SYMBOL LETTER S}"
THUMB = "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}"
EVERY_ASCII = "".join(map(chr, range(128)))
# UTF-8 of these uses every byte there is in it: 0xC0, 0xC1 and those above 0xF4 never occur. Only characters
# that are old or will never be letters: libraries know different versions of Unicode.
EVERY_LEAD = "".join(
    chr(n)
    for n in (*range(0x80, 0x800, 37), *range(0x800, 0xD000, 1013), *range(0x10000, 0x1F000, 97))
    if unicodedata.ucd_3_2_0.category(chr(n)) != "Cn"
) + "".join(chr(n) for n in range(0x40000, 0x110000, 0xFFFF))

TEXTS = {
    "empty": "",
    "one letter": "a",
    "one space": " ",
    "one newline": "\n",
    "sentence": "The dog bites the man; the man bites the dog. They don't care, do they?",
    "endings": "I'll say he's sure we've won, they're late, I'm off, she'd go, don't 'S 'LL can''t x's1 's",
    "spaces": "a  b   c \t d\n\n  e \n f   ",
    "carriage returns": "one\r\ntwo\r\n\r\n three\r four\r\n",
    "odd white space": "a\u00a0b\u2003 c\u3000d\u0085e\x1cf\x0bg\u200bh\ufeffi",
    "digits": "in 1984, 3.14 and 10,000; x2 2x \u00b2 \u2167 \u0663\u0664",
    "marks": "... !? -- (a) #b_c <|endoftext|> $5 a.b a .b",
    "accents": "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m A\u030angstro\u0308m",
    "lone combining marks": "\u0301 \u0301\u0302a\u0303\u0304 b \u20dd",
    "byte order marks": "\ufeffone \ufefftwo\ufeff",
    "emoji": f"{FAMILY} {FAMILY}{FLAG}{THUMB} ok {THUMB}{THUMB} \N{ROLLING ON THE FLOOR LAUGHING}",
    "scripts": "\u6f22\u5b57\u3068\u4eee\u540d \u0440\u0443\u0441\u0441 \u05e2\u05d1\u05e8 \u0e17\u0e22 \u0939\u093f",
    "ascii": EVERY_ASCII,
    "every byte of UTF-8": EVERY_LEAD,
    "run": "a" * 1000,
    "runs": "a" * 7 + "!" + "a" * 6 + " " * 13 + "b" * 5 + "a" * 9 + "\n" * 8,
    "end of Unicode": "\x00\x00\U0010ffff\ufffd\uffff\x7f",
}  # fmt: skip
each_text = pytest.mark.parametrize("name", TEXTS)

# --- oracles -------------------------------------------------------------------------------


@cache
def trained(text, vocab_size):
    """Return (vocabulary, merges, tokenizer) that `tokenizers` makes of the text."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    theirs.train_from_iterator([text], trainer)
    model = json.loads(theirs.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]], theirs


def oracle(merges):
    """Return the tokenizer of `tokenizers` with these merges, which need not come from training."""
    ids = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        ids[left + right] = len(ids)
    theirs = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    return theirs


def pieces_of(text):
    return [piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]


def first_difference(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"at {i}: got {a!r}, expected {b!r}"
    return f"got {len(ours)}, expected {len(theirs)}; the shorter is the beginning of the longer"


def same(ours, theirs, what):
    __tracebackhide__ = True
    assert type(ours) is list, f"{what} should be a list, not {type(ours).__name__}"
    assert ours == theirs, f"{what}: {first_difference(ours, theirs)}"


def refuses(call, what):
    try:
        result = call()
    except ValueError:
        return
    pytest.fail(f"{what}: returned {result!r:.100} instead of raising ValueError", pytrace=False)


def words_text(seed, count, vocabulary_size=3000):
    """Return `count` words of which few are frequent and many are rare, as in a language."""
    r = random.Random(seed)
    letters = ("bcdfghklmnprstvw", "aeiou", "nrst ")
    syllables = ["".join(r.choice(some) for some in letters).strip() for _ in range(90)]
    words = ["".join(r.choices(syllables, k=r.choice([1, 1, 2, 2, 3]))) for _ in range(vocabulary_size)]
    words[::17] = [w + "\u00e9\u00df" for w in words[::17]]
    weights = [1 / (rank + 2) for rank in range(vocabulary_size)]
    ends = [" "] * 20 + [
        ", ",
        ". ",
        "\n",
        "'s ",
        " 1984 ",
        "\r\n  ",
        "; \u6f22\u5b57 ",
        "!\n\n",
        f" {THUMB} ",
    ]
    return "".join(w + r.choice(ends) for w in r.choices(words, weights, k=count))


TRAINING_TEXT = words_text(seed=1, count=3000)


@cache
def our_merges():
    return train(TRAINING_TEXT, 256 + 190)


# --- Part 1: from text to pieces -------------------------------------------------------------


def test_alphabet_keeps_printable_bytes_and_shifts_the_others():
    expected = {}
    for byte in range(256):
        if byte <= 32:  # the first 33
            expected[byte] = chr(256 + byte)
        elif 127 <= byte <= 160:  # the next 34
            expected[byte] = chr(256 + 33 + byte - 127)
        else:
            expected[byte] = chr(byte) if byte != 173 else chr(256 + 67)
    alphabet = bytes_to_unicode()
    wrong = {b: (alphabet.get(b), c) for b, c in expected.items() if alphabet.get(b) != c}
    assert not wrong, f"byte: (yours, expected), of {len(wrong)} wrong ones: {dict(list(wrong.items())[:4])}"
    assert len(alphabet) == 256, f"the alphabet has {len(alphabet)} entries: 256 bytes, no others"


def test_alphabet_has_the_characters_of_gpt2():
    assert set(bytes_to_unicode().values()) == set(pre_tokenizers.ByteLevel.alphabet())


@each_text
def test_pieces_match_tokenizers(name):
    same(pre_tokenize(TEXTS[name]), pieces_of(TEXTS[name]), f"the pieces of {name!r}")


def test_pieces_of_a_space_and_an_accent_by_hand():
    same(pre_tokenize("Hi \u00e9"), ["Hi", "\u0120\u00c3\u00a9"], "the pieces of 'Hi \u00e9'")


def test_pieces_are_cut_before_they_become_bytes():
    # The bytes of these letters include 0xA0 and 0x85, which as characters are white space.
    text = "\u00e0\u0420\u0145 \u4e60\u0105"
    same(pre_tokenize(text), pieces_of(text), "pieces: cut the text, not its bytes")


@bounded
@given(st.text(alphabet="ab1 '\n\r\tst!\u00e9\u0301\u3000\u6f22\u00b2\U0001f642\u200d", max_size=30))
def test_pieces_of_random_text(text):
    same(pre_tokenize(text), pieces_of(text), f"the pieces of {text!r}")


# --- Part 2: training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbols", "pair", "expected"),
    [
        ("x y z", "y z", "x yz"),
        ("x y z", "x y", "xy z"),
        ("x y x y z x", "x y", "xy xy z x"),
        ("a a a", "a a", "aa a"),
        ("a a a a", "a a", "aa aa"),
        ("a a a a a b a a", "a a", "aa aa a b aa"),
        ("a b a b", "b a", "a ba b"),
        ("a aa aa a", "a aa", "aaa aa a"),
        ("ab c a bc", "a bc", "ab c abc"),
        ("y x", "x y", "y x"),
        ("x", "x x", "x"),
        ("", "x x", ""),
    ],
)
def test_merge_pair_by_hand(symbols, pair, expected):
    merged = merge_pair(symbols.split(), tuple(pair.split()))
    same(merged, expected.split(), f"{pair!r} joined in {symbols!r}")


def test_merge_pair_of_random_symbols(rng):
    # One character per symbol, and str.replace does the same from left to right.
    names = {"0": "a", "1": "b", "2": "aa", "3": "ab"}
    for _ in range(200):
        code = "".join(rng.choice(list("0011123"), size=rng.integers(0, 12)))
        x, y = rng.choice(list("0123"), size=2)
        expected = [names.get(c, names[x] + names[y]) for c in code.replace(x + y, "#")]
        symbols = [names[c] for c in code]
        same(merge_pair(symbols, (names[x], names[y])), expected, f"{names[x], names[y]} joined in {symbols}")


def test_merge_pair_leaves_its_input_alone():
    for symbols in (["a", "b", "a", "b"], ["a", "c"]):
        before = list(symbols)
        merged = merge_pair(symbols, ("a", "b"))
        merged.append("z")
        assert symbols == before, "merge_pair changed, or handed back, the list it was given"
    same(merge_pair(("a", "b"), ("a", "b")), ["ab"], "the merge of a tuple of symbols")


def test_vocabulary_without_merges_is_the_alphabet_in_order_of_code_points():
    theirs, _, _ = trained("", 256)
    ids = vocabulary([])
    assert ids == theirs, f"ids: {first_difference(sorted(ids, key=ids.get), sorted(theirs, key=theirs.get))}"
    assert (ids["!"], ids["A"], ids["\u0120"]) == (0, 32, 220)


def test_vocabulary_numbers_merges_from_256_on():
    theirs, merges, _ = trained(TEXTS["sentence"], 300)
    ids = vocabulary(merges)
    assert ids == theirs, f"ids: {first_difference(sorted(ids, key=ids.get), sorted(theirs, key=theirs.get))}"
    assert ids["".join(merges[0])] == 256, "the first merge makes token 256"


def test_train_by_hand():
    # hug 3, pug 2, un 1: (u, g) occurs 5 times, then (h, ug) 3 times, then (p, ug) 2 times.
    text = "hug!hug!hug!pug!pug!un"
    same(train(text, 259), [("u", "g"), ("h", "ug"), ("p", "ug")], "merges")


def test_train_finds_the_most_frequent_pair_not_the_first():
    same(train("ab!cd!cd", 257), [("c", "d")], "merges")


def test_train_counts_every_occurrence_of_a_piece():
    same(
        train("xy!xy!xy!xa!ya!za!zb", 257), [("x", "y")], "merges: does a piece count as often as it occurs?"
    )


def test_train_counts_places_that_overlap():
    # a a a has two places with (a, a): 6 in all, against 5 of (b, c).
    same(train("aaa!aaa!aaa!bc!bc!bc!bc!bc", 257), [("a", "a")], "merges: places that overlap count")


def test_train_does_not_count_across_pieces():
    same(train("a!a!a!bc!bc", 257), [("b", "c")], "merges: no pair goes from one piece to the next")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dc!ba", "b a"),  # not the pair that comes first in the text
        ("ba!dc", "b a"),  # nor the last one
        ("ac!ab", "a b"),  # equal left tokens: the right one decides
        ("ca!ab!bb", "a b"),
        ("a\u00e9", "a \u00c3"),
        ("y!! z", "! !"),
        (" c!bd", "b d"),  # the space is byte 32, but its character Ġ comes late
        ("\x7f\x7f\u00e9", "\u00c3 \u00a9"),
    ],
)
def test_train_ties_go_to_the_smallest_ids(text, expected):
    _, theirs, _ = trained(text, 257)
    assert theirs == [tuple(expected.split())], "the test is broken"
    same(train(text, 257), theirs, f"all pairs of {text!r} occur once; merges")


def test_train_ties_compare_ids_not_strings():
    # After (a, b), the pairs (ab, q) and (z, y) occur once. As strings "ab" < "z", but ab has id 256.
    text = "ab!ab!ab!abq!zy"
    same(train(text, 258), [("a", "b"), ("z", "y")], "merges")
    # (a, b) becomes 256 and (a, a) 257, so (ab, x) wins against (aa, x), although "aa" < "ab".
    text = "ab!ab!ab!aa!aa!aax!abx"
    same(train(text, 259)[:3], [("a", "b"), ("a", "a"), ("ab", "x")], "merges")


@each_text
def test_train_matches_tokenizers(name):
    for vocab_size in (256, 257, 275, 400):
        _, theirs, _ = trained(TEXTS[name], vocab_size)
        same(train(TEXTS[name], vocab_size), theirs, f"merges of {name!r} for {vocab_size} tokens")


def test_train_matches_tokenizers_on_random_text(rng):
    # Few letters: many ties, many runs, and counts that fall while a pair waits its turn.
    for alphabet in ("ab", "abc ", "aabb  ", "abcdefgh ", "a\u00e9\u6f22 \n", "\U0001f642\U0001f643\u200d a"):
        for length in (2, 3, 9, 40, 150, 400):
            text = "".join(rng.choice(list(alphabet), size=length))
            _, theirs, _ = trained(text, 330)
            same(train(text, 330), theirs, f"merges of {text!r:.60}")


def test_train_matches_tokenizers_on_runs_of_random_length(rng):
    for _ in range(20):
        text = "".join(c * n for c, n in zip("abab!aabab! b", rng.integers(1, 12, size=13), strict=True))
        _, theirs, _ = trained(text, 300)
        same(train(text, 300), theirs, f"merges of {text!r}")


def test_train_matches_tokenizers_on_words():
    _, theirs, _ = trained(TRAINING_TEXT, 256 + 190)
    same(train(TRAINING_TEXT, 256 + 190), theirs, "merges")


def test_train_of_a_longer_text():
    text = words_text(seed=2, count=16_000)
    _, theirs, _ = trained(text, 256 + 260)
    same(train(text, 256 + 260), theirs, "merges")


def test_train_of_one_very_long_piece():
    # 2^14 + 3 equal letters: each merge halves the piece, and what is left over joins at the end.
    text = "a" * 16_387
    _, theirs, _ = trained(text, 300)
    same(train(text, 300), theirs, "merges")
    assert len(theirs) < 300 - 256, "the test is broken"


def test_train_stops_when_nothing_is_left_to_merge():
    for text in ("", "a", "ab", "abab!c", "\u6f22"):
        _, theirs, _ = trained(text, 5000)
        same(train(text, 5000), theirs, f"merges of {text!r}: stop when no piece has two tokens")


def test_train_returns_a_list_of_pairs_of_strings():
    merges = train("hug hug pug", 260)
    assert type(merges) is list
    for merge in merges:
        assert type(merge) is tuple, f"{merge!r} should be a tuple"
        assert [type(token) for token in merge] == [str, str], f"{merge!r} should be two strings"
    same(train("hug", 256), [], "merges for a vocabulary of the 256 bytes")


@pytest.mark.parametrize("vocab_size", [255, 1, 0, -1])
def test_train_refuses_a_vocabulary_smaller_than_the_alphabet(vocab_size):
    refuses(lambda: train("hug hug pug", vocab_size), f"vocab_size {vocab_size}")
    refuses(lambda: train("", vocab_size), f"vocab_size {vocab_size} and no text")


def test_train_starts_anew_every_time():
    _, theirs, _ = trained("hug!hug!pug", 260)
    train("xy!xy!xy zz", 258)
    for _ in range(2):
        same(train("hug!hug!pug", 260), theirs, "merges, when something else was trained before")


@pytest.mark.slow
def test_train_of_a_megabyte():
    text = words_text(seed=3, count=170_000, vocabulary_size=20_000)
    assert len(text.encode("utf-8")) > 1_000_000, "the test is broken"
    _, theirs, _ = trained(text, 1256)
    same(train(text, 1256), theirs, "merges")


# --- Part 3: the tokenizer -------------------------------------------------------------------


def test_encode_takes_the_earliest_merge_not_the_first_place():
    merges = [("b", "c"), ("a", "b"), ("x", "y"), ("xy", "z"), ("y", "z")]
    same(Tokenizer(merges).encode("abc"), [64, 256], "ids: (b, c) was merged before (a, b)")
    same(Tokenizer(merges).encode("ab"), [257], "ids")
    same(Tokenizer(merges).encode("yz xyz"), [260, 220, 259], "ids")


def test_encode_is_not_the_longest_token_that_fits():
    # All of abcd is a token, but (b, c) comes first, and then nothing leads to it.
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd")]
    same(Tokenizer(merges).encode("abcd"), oracle(merges).encode("abcd").ids, "ids")


def test_encode_uses_only_pairs_that_are_merges():
    # The token abc exists, made of ab and c. From a and bc nobody made it.
    merges = [("b", "c"), ("b", "x"), ("a", "b"), ("ab", "c")]
    same(Tokenizer(merges).encode("abc"), oracle(merges).encode("abc").ids, "ids")


@each_text
def test_encode_matches_tokenizers(name):
    for text, size in ((TRAINING_TEXT, 256 + 190), (TEXTS[name], 290)):
        _, merges, theirs = trained(text, size)
        same(Tokenizer(merges).encode(TEXTS[name]), theirs.encode(TEXTS[name]).ids, f"ids of {name!r}")


def test_encode_of_text_that_training_did_not_see():
    _, merges, theirs = trained(TRAINING_TEXT, 256 + 190)
    for seed in (5, 6):
        text = words_text(seed=seed, count=700)
        same(Tokenizer(merges).encode(text), theirs.encode(text).ids, "ids")


def test_encode_of_random_letters(rng):
    for _ in range(12):
        alphabet = list(rng.choice(["ab", "abc", "aab ", "a\u00e9"]))
        seen, unseen = ("".join(rng.choice(alphabet, size=n)) for n in (300, 200))
        _, merges, theirs = trained(seen, 290)
        same(Tokenizer(merges).encode(unseen), theirs.encode(unseen).ids, f"ids of {unseen!r:.60}")


def test_encode_of_one_very_long_piece():
    _, merges, theirs = trained("a" * 1000 + "!" + "ab" * 300, 280)
    text = "a" * 4001 + "!" + "ab" * 501 + "a" * 77
    same(Tokenizer(merges).encode(text), theirs.encode(text).ids, "ids")


def test_encode_without_merges_gives_a_token_per_byte():
    text = TEXTS["emoji"] + EVERY_ASCII
    _, _, theirs = trained("", 256)
    ids = Tokenizer([]).encode(text)
    same(ids, theirs.encode(text).ids, "ids")
    assert len(ids) == len(text.encode("utf-8"))


@bounded
@given(st.text(max_size=40))
def test_encode_and_decode_return_any_text(text):
    for merges in ([], our_merges()):
        tokenizer = Tokenizer(merges)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"{text!r} becomes {tokenizer.decode(ids)!r}"


@each_text
def test_round_trip_of_a_tokenizer_trained_on_the_text(name):
    tokenizer = Tokenizer(train(TEXTS[name], 500))
    back = tokenizer.decode(tokenizer.encode(TEXTS[name]))
    assert back == TEXTS[name], f"{name!r}: {first_difference(back, TEXTS[name])}"


def test_decode_reads_a_character_that_is_spread_over_tokens():
    tokenizer = Tokenizer([])
    for text in ("\u00e9", "\u6f22", FAMILY, THUMB):
        ids = [tokenizer.ids[bytes_to_unicode()[byte]] for byte in text.encode("utf-8")]
        assert tokenizer.decode(ids) == text, "read the bytes of all tokens together, not token by token"


def test_decode_replaces_what_is_no_utf8():
    order = {bytes_to_unicode()[byte]: byte for byte in range(256)}
    ids = {order[char]: i for i, char in enumerate(sorted(order))}
    cases = [
        b"\xff",
        b"a\x80b",
        b"\xf0\x9f\x99",
        b"\xf0\x9f!",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xe6\xbc\xff\xe6",
    ]
    for data in [*cases, bytes(range(256)), bytes(range(255, -1, -1))]:
        text = Tokenizer([]).decode([ids[byte] for byte in data])
        expected = data.decode("utf-8", errors="replace")
        assert text == expected, f"{data[:12]!r}... decodes to {text[:12]!r}, expected {expected[:12]!r}"


def test_decode_of_any_ids_matches_tokenizers(rng):
    _, merges, theirs = trained(TRAINING_TEXT + TEXTS["emoji"] * 9, 256 + 190)
    tokenizer = Tokenizer(merges)
    for length in (0, 1, 2, 5, 30, 200):
        for _ in range(10):
            ids = rng.integers(0, 256 + 190, size=length).tolist()
            assert tokenizer.decode(ids) == theirs.decode(ids), f"the text of {ids[:12]}"


def test_decode_of_every_single_token_matches_tokenizers():
    _, merges, theirs = trained(TRAINING_TEXT, 256 + 190)
    tokenizer = Tokenizer(merges)
    for i in range(256 + 190):
        assert tokenizer.decode([i]) == theirs.decode([i]), f"the text of token {i}"


def test_decode_takes_any_iterable_once():
    tokenizer = Tokenizer([("h", "i")])
    assert tokenizer.decode(iter([256, 0, 256])) == "hi!hi"
    assert tokenizer.decode((256,)) == "hi"
    assert tokenizer.decode([]) == ""


def test_decode_refuses_ids_outside_the_vocabulary():
    tokenizer = Tokenizer([("h", "i")])
    for i in (257, 100_000, -1, -257, -258):
        refuses(lambda i=i: tokenizer.decode([0, i]), f"decode of id {i} with 257 tokens")
    assert tokenizer.decode([0, 256]) == "!hi"


def test_two_tokenizers_do_not_disturb_each_other():
    merges = [("h", "i"), ("l", "o")]
    one, two = Tokenizer(merges), Tokenizer([("l", "o")])
    for _ in range(2):
        same(one.encode("hi lo"), [256, 220, 257], "ids of the first tokenizer")
        same(two.encode("hi lo"), [71, 72, 220, 256], "ids of the second tokenizer")
        assert (one.decode([257]), two.decode([256])) == ("lo", "lo")
    assert merges == [("h", "i"), ("l", "o")], "the merges belong to the caller"


def test_everything_is_your_own(forbid):
    _, theirs, _ = trained(TEXTS["sentence"], 290)
    text, whose = TEXTS["sentence"], "here you build what it does"
    forbid(tokenizers.Tokenizer, models.BPE, trainers.BpeTrainer, pre_tokenizers.ByteLevel, why=whose)
    merges = train(text, 290)
    same(merges, theirs, "merges")
    assert Tokenizer(merges).decode(Tokenizer(merges).encode(text)) == text
