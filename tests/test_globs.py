"""Globs: the grammar, what it refuses, and how long a match takes."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.mask_algebra import check_glob as check
from flaxtransfer.mask_algebra import matches_glob as match


@pytest.mark.parametrize(
    ("pattern", "matches", "misses"),
    [
        ("fc/kernel", ["fc/kernel"], ["fc/kernels", "xfc/kernel", "fc", "a/fc/kernel"]),
        ("fc/*", ["fc/kernel", "fc/bias"], ["fc", "fc/a/b"]),
        ("*", ["fc"], ["fc/kernel"]),
        ("**", ["fc", "fc/kernel", "a/b/c"], []),
        ("layer4/**", ["layer4/0/bn1/scale", "layer4"], ["layer40/0/bn1/scale", "layer3/0"]),
        ("**/bias", ["bias", "fc/bias", "a/b/bias"], ["fc/bias2", "unbias", "bias/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb", "a/b/c"]),
        ("**/a/**", ["a", "x/a", "a/x", "x/a/y"], ["xa", "b"]),
        ("conv?/kernel", ["conv1/kernel"], ["conv/kernel", "conv10/kernel", "conv//kernel"]),
        ("layer[34]/*", ["layer3/0", "layer4/1"], ["layer2/0", "layer34/0"]),
        ("layer[0-2]", ["layer0", "layer2"], ["layer3", "layer-"]),
        ("layer[!0-2]", ["layer3", "layer-"], ["layer1", "layer"]),
        ("layer[^1]", ["layer2"], ["layer1"]),
        ("a[]]", ["a]"], ["a", "a[]]"]),
        ("a[*]", ["a*"], ["ab", "a"]),
        ("*[0-9]*", ["conv1", "1", "bn2a"], ["conv", ""]),
        ("a[{]", ["a{"], ["a"]),
        ("a[+-9]b", ["a5b", "a+b"], ["a/b"]),
        ("a[!x]b", ["ayb"], ["a/b", "axb"]),
        ("a.b", ["a.b"], ["axb"]),
        ("{a,b}/x", ["a/x", "b/x"], ["c/x", "{a,b}/x", "a", "x"]),
        ("layer{3,4/1}/k", ["layer3/k", "layer4/1/k"], ["layer4/k", "layer3/1/k"]),
        ("bn{,1,2}", ["bn", "bn1", "bn2"], ["bn3"]),
        ("{a{b,c},d}", ["ab", "ac", "d"], ["a", "b", "abc"]),
        ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"], ["ab", "a"]),
        ("{a}", ["a"], ["{a}"]),
        ("{**,x}/k", ["k", "a/b/k", "x/k"], ["a/kk"]),
        ("a,b", ["a,b"], ["a", "b"]),
    ],
)
def test_glob(pattern, matches, misses):
    assert [path for path in matches if not match(pattern, path)] == []
    assert [path for path in misses if match(pattern, path)] == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("", "empty component"),
        ("/fc", "empty component"),
        ("fc/", "empty component"),
        ("a//b", "empty component"),
        ("{,a}/b", "empty component"),
        ("a{b", "never closes a brace"),
        ("a}b", "never opened"),
        ("a[b", r"never closes a '\['"),
        ("a[]", r"never closes a '\['"),
        ("layer**", "'\\*\\*' stands for whole components"),
        ("a[9-0]", "range 9-0 runs backwards"),
    ],
)
def test_globs_outside_the_grammar_are_refused(pattern, text):
    with pytest.raises(ValueError, match=text):
        check(pattern)
    with pytest.raises(ValueError, match=text):
        match(pattern, "fc/kernel")


def backtracked(pattern, path):
    """The same grammar as one regular expression that tries everything: slow, and simple."""

    def translated(component):
        if component == "**":
            return "(?:[^/]+/)*"
        component = component.replace("[!", "[^").replace("[", "(?!/)[")
        return re.sub(r"\*|\?(?!!)", lambda m: "[^/]*" if m[0] == "*" else "[^/]", component) + "/"

    alternatives = ("".join(map(translated, each.split("/"))) for each in expanded(pattern))
    return re.fullmatch("|".join(alternatives), path + "/") is not None


def expanded(pattern):
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    parts = (
        pattern[: found.start()] + each + pattern[found.end() :] for each in found[1].split(",")
    )
    return [one for part in parts for one in expanded(part)]


components = st.one_of(
    st.just("**"),
    st.lists(
        st.sampled_from(["a", "b", "?", "*", "[ab]", "[!a]", "{a,b}", "{,ab}", "{*a,b}"]),
        min_size=1,
        max_size=5,
    )
    .map("".join)
    .filter(
        lambda text: not any("**" in one for one in expanded(text)) and "" not in expanded(text)
    ),
)


@given(
    st.lists(components, min_size=1, max_size=6)
    .map("/".join)
    .filter(lambda pattern: pattern.count("{") <= 4),
    st.lists(
        st.lists(st.text("abc", max_size=4), max_size=5).map("/".join), min_size=1, max_size=5
    ),
)
def test_globs_mean_what_trying_everything_finds(pattern, candidates):
    for path in candidates:
        assert match(pattern, path) == backtracked(pattern, path), (pattern, path)


STARS = "".join(f"*{c}" for c in "ab" * 12)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        (STARS + "z", "ab" * 100),
        ("*" + "a*" * 25 + "z", "a" * 5000),
        ("/".join(["**", "a"] * 20) + "/z", "/".join("a" * 300)),
        ("/".join(["**", "*"] * 20) + "/z", "/".join("a" * 300)),
        ("**/" + "/".join([STARS] * 10) + "z", "/".join(["ab" * 30] * 60)),
        ("{" + ",".join([STARS + "z"] * 30) + "}", "ab" * 100),
        ("?*" * 300 + "z", "a" * 2000),
    ],
)
def test_many_stars_end_soon(pattern, path):
    start = time.process_time()
    assert not match(pattern, path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("{a,b}" * 20, "has too many alternatives"),
        ("{a,b}" * 65, "at most 2,000 characters and 64 '{', got 325 and 65"),
        ("{" * 5000, "at most 2,000 characters"),
        ("a" * 100_000, "got 100,000"),
        ("[" * 1999, "never closes"),
        ("{" + "a," * 900 + "}" + "{" + "b," * 50 + "}", "has too many alternatives"),
    ],
)
def test_globs_of_no_person_are_refused_soon_in_few_words(pattern, text):
    start = time.process_time()
    with pytest.raises(ValueError, match=text) as caught:
        check(pattern)
    assert len(str(caught.value)) < 300
    assert time.process_time() - start < 2


@given(st.lists(st.text("ab1.", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join))
def test_a_plain_path_is_a_glob_for_itself_alone(path):
    assert match(path, path)
    assert not match(path, path + "x")
    assert not match(path, "x/" + path)
