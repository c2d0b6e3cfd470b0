import pytest
from pydantic import ValidationError

from storage.identity import Identity, describe_differences, stored_tau
from tests.storage.synthetic_cache import make_identity


def test_equal_identities_do_not_differ_even_after_json():
    identity = make_identity()
    assert describe_differences(identity, identity) == []
    assert describe_differences(identity, Identity.model_validate_json(identity.model_dump_json())) == []


def test_tuples_in_a_selection_equal_their_json_lists():
    a = make_identity(selection={"response": {"temperatures": (1.0, 2.0)}})
    b = make_identity(selection={"response": {"temperatures": [1.0, 2.0]}})
    assert describe_differences(a, b) == []


def test_every_field_that_differs_gets_a_line():
    cache = make_identity(dtype="a", selection={"response": {"tau": 0.1}, "old": {"x": 1}})
    run = make_identity(dtype="b", num_parts=3, selection={"response": {"tau": 0.2}, "new": {"y": 2}})
    assert describe_differences(cache, run) == [
        "dtype: cache has 'a', this run has 'b'",
        "num_parts: cache has 2, this run has 3",
        "selection.response.tau: cache has 0.1, this run has 0.2",
        "selection.old: cache has {'x': 1}, this run has None",
        "selection.new: cache has None, this run has {'y': 2}",
    ]


def test_location_fields_are_not_compared():
    one, other = (make_identity(teacher=f"/{place}/teacher", image_root=f"/{place}/images") for place in "ab")
    assert describe_differences(one, other) == []
    assert one.content_json() == other.content_json()
    assert one.content_json() != make_identity(teacher="/a/teacher", teacher_fingerprint="z").content_json()


def test_tau_counts_only_where_something_is_sampled():
    identity = make_identity(
        selection={"response": {"method": "threshold", "tau": 0.1}, "visual": {"method": "topk", "k": 5}}
    )
    assert stored_tau(identity, "response") == 0.1
    assert stored_tau(identity, "visual") == 0.0
    assert stored_tau(identity, "relation") == 0.0


@pytest.mark.parametrize(
    "selection",
    [
        {"method": "nucleus", "p": 0.9},
        {"method": ["topk"], "k": 5},
        {"method": "topk", "tau": 0.1},
        {"method": "threshold", "tau": "0.1"},
        {"method": "sampled", "draws": 0},
    ],
)
def test_an_unknown_or_incomplete_selection_is_refused(selection: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"selection \{.* is none of the methods .*threshold: tau"):
        make_identity(selection={"response": selection})
