from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from storage.errors import IdentityError, StillhouseError
from storage.records.records import (
    ImageRef,
    PooledRelation,
    Relation,
    RelationFactor,
    RelationMatrix,
    SampleRecord,
    TokensRecord,
)
from storage.records.sample_batch import SampleBatch
from storage.records.sample_key import SampleKey
from student_train.data.collate import (
    SequenceFormat,
    collate,
    collate_prompts,
    cut_prompt,
    expand_tokens,
    find_answer_spans,
)
from student_train.data.sample_images import VisionInput
from tests.student_train.caches import join_records, sparse_rows

IMAGE = 9
GRID = SequenceFormat(image_token_id=IMAGE, tokens_per_image=3, pad_token_id=0, max_length=32)


def image(name: str, tokens: int = 3) -> ImageRef:
    return ImageRef(name, "0" * 64, tokens, key=name.encode().hex().ljust(64, "0"))


def sample(ids: Sequence[int], responses: Sequence[int], *images: ImageRef, name: str = "s") -> TokensRecord:
    mask = np.zeros(len(ids), bool)
    mask[list(responses)] = True
    return TokensRecord(SampleKey(name), "train", "c", np.array(ids, np.int32), mask, images)


def gather(samples: SampleBatch) -> VisionInput:
    nothing = torch.zeros(0, dtype=torch.int64)
    return VisionInput(tuple(ref.path for refs in samples.images for ref in refs), None, nothing, None, nothing)


def record(tokens: TokensRecord, seed: int = 0, tokens_per_image: int = 3) -> SampleRecord:
    draw = np.random.default_rng(seed)
    return SampleRecord(
        tokens,
        response=sparse_rows(draw.normal(size=(tokens.num_response_tokens, 10)), k=2),
        visual={ref.key: sparse_rows(draw.normal(size=(tokens_per_image, 10)), k=3) for ref in tokens.images},
        relation={ref.key: RelationMatrix(np.full((3, 3), len(ref.path), np.float32), 1.0) for ref in tokens.images},
    )


@pytest.mark.parametrize(
    ("tokens", "input_ids", "rows", "visual"),
    [
        # Rows 5 and 6 are of tokens 3 and 4, which predict 4 and 5; visual rows are not shifted.
        (
            sample([1, IMAGE, 2, 3, 4, 5, 6], [4, 5], image("a")),
            [1, *[IMAGE] * 3, 2, 3, 4, 5, 6], {5: 4, 6: 5}, [1, 2, 3],
        ),
        # A response right after an image is predicted at its last visual token.
        (sample([1, IMAGE, 4], [2], image("a")), [1, *[IMAGE] * 3, 4], {3: 4}, [1, 2, 3]),
        (
            sample([IMAGE, 1, 2, IMAGE, 3, 4, 5], [2, 5], image("a"), image("b")),
            [*[IMAGE] * 3, 1, 2, *[IMAGE] * 3, 3, 4, 5], {3: 2, 8: 4}, [0, 1, 2, 5, 6, 7],
        ),
    ],
    ids=["one image", "answer after image", "two images and turns"],
)  # fmt: skip
def test_placeholders_expand_and_rows_are_predicted_one_position_before(
    tokens: TokensRecord, input_ids: list[int], rows: dict[int, int], visual: list[int]
) -> None:
    found = collate(SampleBatch.of_tokens([tokens]), GRID, gather)
    assert found.input_ids.tolist() == [input_ids]
    assert dict(zip(found.response_positions.tolist(), found.labels.tolist(), strict=True)) == rows
    assert found.visual_positions.tolist() == visual


def test_positions_of_a_padded_batch_are_flat() -> None:
    short = record(sample([1, 2, 3], [1, 2], name="short"), seed=1)
    long = record(sample([1, IMAGE, 4, 5], [3], image("a"), name="long"), seed=2)
    batch = collate(join_records([short, long]), GRID, gather, families=("response", "visual", "relation"))
    assert batch.sample_ids == ("short", "long")
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0, 0], [1, IMAGE, IMAGE, IMAGE, 4, 5]]
    assert batch.response_positions.tolist() == [0, 1, 6 + 4]
    assert batch.labels.tolist() == [2, 3, 5]
    assert batch.visual_positions.tolist() == [7, 8, 9]
    assert batch.input_ids.flatten()[batch.response_positions + 1].tolist() == batch.labels.tolist()
    assert batch.response is not None
    assert short.response is not None
    assert long.response is not None
    assert batch.response.ids.tolist() == [*short.response.ids, *long.response.ids]
    assert batch.response.num_rows == 3
    assert batch.visual is not None
    assert batch.visual.num_rows == 3
    assert batch.relation is not None
    assert batch.relation[0].values.shape == (1, 3, 3)


def test_pooled_and_factored_matrices_become_a_batch() -> None:
    def relations_of(matrix: Relation) -> torch.Tensor:
        tokens = sample([1, IMAGE, 4], [2], image("a"))
        whole = replace(record(tokens), relation={tokens.images[0].key: matrix})
        batch = collate(join_records([whole]), GRID, gather, families=("relation",))
        assert batch.relation is not None
        return batch.relation[0].values

    pooled = PooledRelation(np.ones((1, 1), np.float32), 1.0, num_visual_tokens=3, pool=2)
    assert relations_of(pooled).tolist() == [[[1.0]]]
    factor = RelationFactor(np.array([[1], [2], [0]], np.float32), 1.0)
    assert relations_of(factor).tolist() == [[[1], [2], [0]]]  # not multiplied out


def test_visual_rows_follow_the_order_of_placeholders_not_of_keys() -> None:
    tokens = sample([IMAGE, 1, IMAGE, 2], [3], image("zz"), image("a"))
    whole = record(tokens)
    batch = collate(join_records([whole]), GRID, gather, families=("visual", "relation"))
    expected = [*whole.visual[tokens.images[0].key].ids, *whole.visual[tokens.images[1].key].ids]
    assert batch.visual is not None
    assert batch.visual.ids.tolist() == expected
    assert batch.relation is not None
    assert batch.relation[0].values[:, 0, 0].tolist() == [2.0, 1.0]
    assert batch.vision.names == ("zz", "a")


def test_a_batch_that_is_not_counted_has_images_but_no_rows() -> None:
    batch = collate(
        join_records([record(sample([1, IMAGE, 4], [2], image("a")))]),
        GRID,
        gather,
        families=("response",),
        counted=False,
    )
    assert batch.response is None
    assert batch.labels.tolist() == []
    assert batch.response_positions.dtype == torch.int64
    assert batch.visual_positions.tolist() == [1, 2, 3]


def test_images_with_other_numbers_of_rows_are_refused_only_where_rows_must_match() -> None:
    whole = record(sample([IMAGE, 4, 5], [2], image("a", tokens=5)), tokens_per_image=5)
    assert collate(join_records([whole]), GRID, gather, families=("response",)).response_positions.tolist() == [3]
    for family in ("visual", "relation"):
        with pytest.raises(IdentityError, match="5 visual tokens for image a of sample 's', but 3 for other images"):
            collate(join_records([whole]), GRID, gather, families=(family,))


def test_a_teacher_with_another_square_grid_keeps_its_rows() -> None:
    sequence_format = replace(GRID, tokens_per_image=4, teacher_tokens_per_image=9)
    whole = record(sample([IMAGE, 4, 5], [2], image("a", tokens=9)), tokens_per_image=9)
    batch = collate(join_records([whole]), sequence_format, gather, families=("visual",))
    assert batch.visual is not None
    assert batch.visual.num_rows == 9
    assert batch.visual_positions.tolist() == [0, 1, 2, 3]
    with pytest.raises(
        IdentityError, match=r"9 visual tokens .* this student has 5, and 5 visual tokens are not a square"
    ):
        collate(join_records([whole]), replace(sequence_format, tokens_per_image=5), gather, families=("visual",))


def test_hidden_states_become_rows_of_the_batch() -> None:
    draw = np.random.default_rng(0)
    records = [record(sample([1, 2, 3], [1, 2], name="s")), record(sample([1, 2], [1], name="t"))]
    states = [draw.normal(size=(n, 4)).astype(np.float32) for n in (2, 1)]
    whole = join_records([replace(each, hidden=h) for each, h in zip(records, states, strict=True)])
    batch = collate(whole, GRID, gather, families=("hidden",))
    assert batch.hidden is not None
    np.testing.assert_array_equal(batch.hidden, np.concatenate(states))
    with pytest.raises(StillhouseError, match="sample 's' was read without the family hidden"):
        collate(join_records(records), GRID, gather, families=("hidden",))


def test_samples_that_cannot_be_expanded_are_refused_by_name() -> None:
    good = sample([1, 2, 3], [2], name="good")
    with pytest.raises(StillhouseError, match="sample 's': its first token is a response token"):
        expand_tokens(SampleBatch.of_tokens([good, sample([1, 2], [0])]), GRID)
    with pytest.raises(StillhouseError, match="sample 's' has 34 tokens, but this student has 32"):
        expand_tokens(SampleBatch.of_tokens([good, sample([1] * 31 + [IMAGE], [5], image("a"))]), GRID)
    incomplete = SampleBatch.of_tokens([sample([1, IMAGE, 2], [2], image("a"))])
    for family in ("response", "visual", "relation", "sequence"):
        with pytest.raises(StillhouseError, match=f"sample 's' was read without the family {family}"):
            collate(incomplete, GRID, gather, families=(family,))


def test_prompts_end_together_before_the_first_response_token() -> None:
    first = sample([1, IMAGE, 2, 7, 8, IMAGE, 3, 6], [3, 4, 7], image("a"), image("b"), name="two turns")
    second = sample([1, 2, 3, 4, 5, 6, 7], [6], name="text")
    prompts = [cut_prompt(tokens, image_token_id=IMAGE) for tokens in (first, second)]
    assert prompts[0].token_ids.tolist() == [1, IMAGE, 2]
    assert [ref.path for ref in prompts[0].images] == ["a"]
    assert find_answer_spans(first) == [(3, 5), (7, 8)]
    assert find_answer_spans(second) == [(6, 7)]
    last = cut_prompt(first, image_token_id=IMAGE, answer=1)  # the first answer stands before the second
    assert last.token_ids.tolist() == [1, IMAGE, 2, 7, 8, IMAGE, 3]
    assert [ref.path for ref in last.images] == ["a", "b"]
    batch = collate_prompts(SampleBatch.of_tokens(prompts), GRID, gather)
    assert batch.input_ids.tolist() == [[0, 1, IMAGE, IMAGE, IMAGE, 2], [1, 2, 3, 4, 5, 6]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch.visual_positions.tolist() == [2, 3, 4]
    with pytest.raises(StillhouseError, match="sample 's' has no response token"):
        cut_prompt(sample([1, 2], []), image_token_id=IMAGE)
