"""Concepts of the emoji experiment: read from tarballs in npm's format, selected, split by first code point."""

from collections import Counter

from examples.emoji.concepts import (
    HELD_OUT_FRACTIONS,
    MAX_VARIANTS,
    SIDES,
    Concept,
    normalise_hexcode,
    read_concepts,
    read_pictures,
    select_concepts,
    split_by_family,
)
from examples.emoji.packages import NAMES, STYLES, open_tarball
from tests.examples.emoji_tarballs import KINDS, LEFT_OUT_KINDS, NUM_TWINS, write_tarballs


def read_all(folder):
    drawings = {style: read_pictures(open_tarball(folder, package), style) for style, package in STYLES.items()}
    drawn = set.intersection(*(set(pictures) for pictures in drawings.values()))
    return read_concepts(open_tarball(folder, NAMES), drawn), drawings


def make_concepts(*kinds_and_codes: tuple[str, str]) -> list[Concept]:
    return [Concept(code, f"name {code}", kind, "group", f"el {kind}") for kind, code in kinds_and_codes]


def test_concepts_are_read_in_unicodes_order_with_words_in_both_languages(tmp_path):
    write_tarballs(tmp_path)
    concepts, drawings = read_all(tmp_path)
    assert concepts[0] == Concept("1F000", "animal-cat 1F000", "animal-cat", "animals", "español animal-cat")
    wanted = {kind: num for kind, _, num in KINDS.values() if kind not in LEFT_OUT_KINDS}
    assert Counter(concept.kind for concept in concepts) == {
        **wanted,
        "tool": wanted["tool"] + (MAX_VARIANTS - 1) * NUM_TWINS,
    }
    for concept in concepts:
        for style in STYLES:
            assert drawings[style][concept.hexcode] == f"{style} {concept.hexcode}".encode()


def test_a_concept_needs_a_picture_in_each_style(tmp_path):
    write_tarballs(tmp_path, undrawn=("1F001",))
    concepts, _ = read_all(tmp_path)
    assert "1F001" not in {concept.hexcode for concept in concepts}
    assert "1F002" in {concept.hexcode for concept in concepts}


def test_people_of_any_gender_are_one_family():
    man, woman, person = make_concepts(*(("person", f"{code}-1F9B0") for code in ("1F468", "1F469", "1F9D1")))
    assert man.family == woman.family == person.family == "1F9D1"


def test_a_family_has_one_kind_and_few_variants():
    family = [("tool", "A"), ("toy", "A-1"), ("tool", "A-2"), ("tool", "A-3"), ("tool", "A-4")]
    others = [(kind, f"{kind}{index}") for kind in ("tool", "toy") for index in range(8)]
    kept = select_concepts(make_concepts(*family, *others))
    assert [concept.hexcode for concept in kept if concept.family == "A"] == ["A", "A-2", "A-3"]


def test_a_kind_of_seven_families_is_left_out():
    enough = [("tool", f"tool{index}") for index in range(8)]
    few = [("toy", f"toy{index}") for index in range(7)] + [("toy", "toy0-1"), ("toy", "toy0-2")]
    assert {concept.kind for concept in select_concepts(make_concepts(*enough, *few))} == {"tool"}


def test_every_kind_has_families_on_every_side_and_variants_stay_together(tmp_path):
    write_tarballs(tmp_path)
    concepts, _ = read_all(tmp_path)
    sides = split_by_family(concepts, seed=0)
    assert set(sides) == {concept.family for concept in concepts}
    for kind in {concept.kind for concept in concepts}:
        families = {concept.family for concept in concepts if concept.kind == kind}
        counts = Counter(sides[family] for family in families)
        assert set(counts) == set(SIDES)
        for side, fraction in HELD_OUT_FRACTIONS.items():
            assert abs(counts[side] - fraction * len(families)) <= 0.5
    assert split_by_family(concepts, seed=0) == sides
    assert split_by_family(concepts, seed=1) != sides


def test_hexcodes_of_all_packages_are_written_alike():
    for written in ("1f441-fe0f-200d-1f5e8-fe0f", "1F441-200D-1F5E8"):
        assert normalise_hexcode(written) == "1F441-200D-1F5E8"
