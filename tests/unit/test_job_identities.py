"""What the digest of each job's artifact is made of: all that changes the result, and nothing else.

What is imported, or encoded by a model, is named by the content of files: tests/integration has that.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deme_core.digests import stage_digest
from deme_core.manifest import ArtifactRef
from deme_core.recipe import (
    DatasetSpec,
    DistillSpec,
    EvaluateSpec,
    FinetuneSpec,
    LoraSpec,
    MethodSpec,
    RegMeanSpec,
    SearchSpec,
    TrainingSpec,
)
from deme_core.settings import Settings
from tasks.jobs import (
    JOBS,
    CheckJob,
    ConfineJob,
    Demands,
    DistillJob,
    EvaluateJob,
    FinetuneJob,
    GeneratedFeaturesJob,
    GeneratedImages,
    GramsJob,
    HeldoutJob,
    Job,
    LossJob,
    MergeJob,
    PretrainJob,
    RealFeaturesJob,
    ReferenceJob,
    ScoreJob,
    SearchJob,
)
from tasks.work.base import JobContext
from tests.family_method import two_classes

Changes = Mapping[str, Any]


def ref(name: str) -> ArtifactRef:
    return ArtifactRef(f"file:///store/stage/{name}", name)


COPIES, OTHER_COPIES = (ref("copy 0"), ref("copy 1")), (ref("copy 1"), ref("copy 0"))
DATASET = DatasetSpec(source="digits", num_images=40)
EVALUATE = EvaluateSpec(num_images=4, extractor="pixels_4x4")
TIES, OTHER_TIES = MethodSpec(method="ties"), MethodSpec(method="ties", density=0.5)

TRAINING = {
    "num_steps": 3,
    "seed": 1,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "num_processes": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": "adamw_8bit",
    "channels_last": True,
    "allow_tf32": True,
    "compile": True,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 1,
    "adam_betas": (0.5, 0.9),
    "weight_decay": 0.1,
    "max_grad_norm": 2.0,
    "ema_decay": 0.5,
    "ema_inv_gamma": 2.0,
    "ema_power": 0.5,
    "mixed_precision": "bf16",
}
SPEED = {"checkpoint_every": 7, "gradient_checkpointing": True}
SAMPLING = {
    "sampler": "ddpm",
    "num_inference_steps": 3,
    "eta": 0.5,
    "timestep_spacing": "trailing",
    "guidance_scale": 2.0,
    "mixed_precision": "bf16",
}
SCORING = {"metrics": ("fid",), "extractor": "efficientnet_lite0", "kid_subset_size": 7}
REPORT_ONLY = {"seeds": (4, 5, 6), "num_images": 8, "batch_size": 1, "num_reference_images": 9, "num_bootstrap": 9}


def within(section: str, changes: Changes) -> dict[str, Any]:
    return {f"{section}.{name}": value for name, value in changes.items()}


IMAGES = {"images.models": COPIES[:1], "images.edges": (0, 400, 1000), "images.seed": 2}
CANDIDATE = {"pretrained": ref("other"), "experts": OTHER_COPIES, "method": OTHER_TIES, "weights": (0.5, 0.2)}
REAL = {"dataset.num_images": 39, "evaluate.extractor": "efficientnet_lite0", "part": "report", "num_for_search": 20}

DEMANDS = Demands(samplings=(EVALUATE,), min_snr_gammas=())

# A job, what changes its result, and what does not.
TABLE: list[tuple[Job, Changes, Changes]] = [
    (
        PretrainJob(dataset=DATASET, unet={}, noise_scheduler={}, training=TrainingSpec(num_steps=1)),
        {
            "dataset.num_images": 39,
            "dataset.random_flip": True,
            "unet": {"layers_per_block": 1},
            "noise_scheduler": {"beta_end": 0.03},
            "text_encoder": {"d_model": 8},
            **within("training", TRAINING),
        },
        within("training", SPEED) | {"demands": DEMANDS},
    ),
    (
        CheckJob(pretrained=ref("pretrained"), demands=DEMANDS),
        {
            "pretrained": ref("other"),
            "demands.samplings": (EVALUATE, EVALUATE),
            "demands.min_snr_gammas": (5.0,),
        },
        {},
    ),
    (
        FinetuneJob(
            label="a copy",
            pretrained=ref("pretrained"),
            dataset=DATASET,
            finetune=FinetuneSpec(num_steps=1),
            low=100,
            high=500,
            num_steps=1,
        ),
        {
            "pretrained": ref("other"),
            "dataset.num_images": 39,
            "dataset.random_flip": True,
            "low": 0,
            "high": 1000,
            "num_steps": 2,
            "latents": COPIES,
            **within("finetune", {name: value for name, value in TRAINING.items() if name != "num_steps"}),
            "finetune.consistency_weight": 0.5,
            "finetune.timestep_sampling": "per_batch_mirrored",
            "finetune.global_sampling_probability": 0.1,
            "finetune.replay": "pretrained",
            "finetune.min_snr_gamma": 5.0,
            "finetune.channel_projection": False,
            "finetune.lora": LoraSpec(rank=2),
        },
        {
            "label": "other",
            "embeddings": COPIES,
            "dataset.cache_precision": "bf16",
            "finetune.num_steps": 9,
            **within("finetune", SPEED),
        },
    ),
    (
        DistillJob(
            label="distilled",
            pretrained=ref("pretrained"),
            merged=ref("merged"),
            experts=COPIES,
            segment_edges=(0, 500, 1000),
            dataset=DATASET,
            distill=DistillSpec(num_steps=1),
            latents=COPIES,
        ),
        {
            "merged": ref("other"),
            "experts": OTHER_COPIES,
            "segment_edges": (0, 400, 1000),
            "dataset.num_images": 39,
            "dataset.random_flip": True,
            "dataset.cache_precision": "bf16",
            "latents": (),
            **within("distill", TRAINING),
        },
        # The merge is of one pretrained model, and encodings are of one model and data set.
        {
            "label": "other",
            "pretrained": ref("other"),
            "latents": OTHER_COPIES,
            "embeddings": COPIES,
            **within("distill", SPEED),
        },
    ),
    (
        GramsJob(expert=ref("copy"), dataset=DATASET, low=100, high=500, spec=RegMeanSpec()),
        {
            "expert": ref("other"),
            "dataset.num_images": 39,
            "low": 0,
            "high": 1000,
            "spec.num_images": 8,
            "spec.max_features": 9,
        },
        {"dataset.random_flip": True, "spec.shrinkage": 0.5},
    ),
    (
        ConfineJob(pretrained=ref("pretrained"), expert=ref("copy"), grams=COPIES, index=0, spec=RegMeanSpec()),
        {
            "pretrained": ref("other"),
            "expert": ref("other"),
            "grams": OTHER_COPIES,
            "index": 1,
            "spec.shrinkage": 0.5,
        },
        {"spec.num_images": 8},
    ),
    (
        SearchJob(
            pretrained=ref("pretrained"),
            experts=COPIES,
            method=TIES,
            segment_edges=(0, 500, 1000),
            is_control=False,
            search=SearchSpec(),
            evaluate=EVALUATE,
            dataset=DATASET,
            reference=ref("reference"),
        ),
        {
            "pretrained": ref("other"),
            "experts": OTHER_COPIES,
            "method": OTHER_TIES,
            "segment_edges": (0, 400, 1000),
            "is_control": True,
            "search.strategy": "grid",
            "search.max_candidates": 5,
            "search.num_images": 6,
            "search.seeds": (7,),
            "dataset.num_images": 39,
            "reference": ref("other"),
            **within("evaluate", SAMPLING | SCORING),
        },
        {"dataset.random_flip": True, "search.num_reference_images": 8, **within("evaluate", REPORT_ONLY)},
    ),
    (
        ScoreJob(
            label="a candidate",
            pretrained=ref("pretrained"),
            experts=COPIES,
            method=TIES,
            weights=(0.2, 0.5),
            evaluate=EVALUATE,
            seeds=(7,),
            num_images=4,
            reference=ref("reference"),
        ),
        CANDIDATE
        | {"seeds": (8,), "num_images": 5, "reference": ref("other"), **within("evaluate", SAMPLING | SCORING)},
        {"label": "other", **within("evaluate", REPORT_ONLY)},
    ),
    (
        LossJob(
            label="a candidate",
            pretrained=ref("pretrained"),
            experts=COPIES,
            method=TIES,
            weights=(0.2, 0.5),
            dataset=DATASET,
            segment_edges=(0, 500, 1000),
        ),
        CANDIDATE | {"dataset.num_images": 39, "segment_edges": (0, 400, 1000)},
        {"label": "other", "dataset.random_flip": True},
    ),
    (
        MergeJob(pretrained=ref("pretrained"), experts=COPIES, method=TIES, weights=(0.2, 0.5)),
        CANDIDATE,
        {"method.drop_rate": 0.9},
    ),
    (
        RealFeaturesJob(dataset=DATASET, evaluate=EVALUATE, part="search", num_for_search=16, low=2, high=16),
        REAL | {"low": 0, "high": 15},
        {"dataset.random_flip": True, **within("evaluate", SAMPLING | {"metrics": ("fid",), "batch_size": 1})},
    ),
    (
        ReferenceJob(dataset=DATASET, evaluate=EVALUATE, part="search", num_for_search=16, features=COPIES),
        REAL | {"evaluate.metrics": ("fid",)},
        {"dataset.random_flip": True, "features": COPIES[:1], **within("evaluate", SAMPLING | {"batch_size": 1})},
    ),
    (
        HeldoutJob(model=ref("model"), dataset=DATASET, edges=(0, 500, 1000)),
        {"model": ref("other"), "dataset.num_images": 39, "edges": (0, 400, 1000)},
        {"dataset.random_flip": True},
    ),
    (
        GeneratedFeaturesJob(
            label="a row",
            images=GeneratedImages(models=COPIES, edges=(0, 500, 1000), seed=1),
            evaluate=EVALUATE,
            low=1,
            high=4,
        ),
        IMAGES | {"low": 0, "high": 3, **within("evaluate", SAMPLING | {"extractor": "efficientnet_lite0"})},
        {"label": "other", **within("evaluate", REPORT_ONLY | {"metrics": ("fid",), "kid_subset_size": 7})},
    ),
    (
        EvaluateJob(
            images=GeneratedImages(models=COPIES, edges=(0, 500, 1000), seed=1),
            features=COPIES,
            evaluate=EVALUATE,
            reference=ref("reference"),
        ),
        IMAGES
        | {
            "reference": ref("other"),
            **within("evaluate", SAMPLING | SCORING | {"num_images": 8, "num_bootstrap": 9}),
        },
        {"features": COPIES[:1], "evaluate.seeds": (4, 5, 6), "evaluate.batch_size": 1},
    ),
]
KINDS = [type(job).__name__ for job, _, _ in TABLE]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> JobContext:
    settings = {"DEME_HOME": tmp_path_factory.mktemp("home"), "DEME_STORE_URI": None}
    return JobContext(Settings.model_validate(settings), "cpu")


def digest(job: Job, context: JobContext) -> str:
    found = import_module(f"tasks.work.{job.work}").identity(job, context)
    settings, inputs, dataset = found.settings, found.inputs, found.dataset
    return stage_digest(job.stage, settings=settings, inputs=inputs, dataset=dataset, version=job.version)


def changed(spec: Any, path: str, value: Any) -> Any:
    """Returns a job, or a part of one, with another value at a dotted path."""
    assert isinstance(spec, BaseModel)
    name, _, rest = path.partition(".")
    before = getattr(spec, name)
    after = changed(before, rest, value) if rest else value
    assert before != after, path
    return spec.model_copy(update={name: after})


@pytest.mark.parametrize(("job", "matters", "_"), TABLE, ids=KINDS)
def test_what_changes_the_result_of_a_job_changes_its_digest(
    job: Job, matters: Changes, _: Changes, context: JobContext
) -> None:
    digests = {path: digest(changed(job, path, value), context) for path, value in matters.items()}
    digests["as it was"] = digest(job, context)
    same = [path for path, found in digests.items() if list(digests.values()).count(found) > 1]
    assert same == []


@pytest.mark.parametrize(("job", "_", "matters_not"), TABLE, ids=KINDS)
def test_what_changes_a_label_or_the_speed_or_another_job_leaves_a_digest(
    job: Job, _: Changes, matters_not: Changes, context: JobContext
) -> None:
    before = digest(job, context)
    assert [path for path, value in matters_not.items() if digest(changed(job, path, value), context) != before] == []


def test_the_table_has_every_field_of_every_job_that_names_models_by_their_digests() -> None:
    assert {*KINDS} == {*JOBS} - {"ImportJob", "ImportCopyJob", "LatentsJob", "EmbeddingsJob"}
    for job, matters, matters_not in TABLE:
        assert {path.partition(".")[0] for path in (*matters, *matters_not)} == set(type(job).model_fields), job.work


def test_the_table_has_every_field_of_a_training() -> None:
    assert {*TRAINING, *SPEED} == {*TrainingSpec.model_fields}


@pytest.mark.parametrize(("method", "is_left_out"), [("task_arithmetic", True), ("ties", False), ("dare", False)])
def test_a_copy_of_weight_zero_is_left_out_only_where_it_changes_nothing(
    method: Any, is_left_out: bool, context: JobContext
) -> None:
    (job,) = (job for job, _, _ in TABLE if isinstance(job, LossJob))
    with_zero = job.model_copy(update={"method": MethodSpec(method=method), "weights": (0.0, 0.5)})
    without = with_zero.model_copy(update={"experts": COPIES[1:], "weights": (0.5,)})
    assert (digest(with_zero, context) == digest(without, context)) == is_left_out


def test_messages_call_a_job_by_its_label_or_else_by_its_stage() -> None:
    for job, _, _ in TABLE:
        label = job.model_dump().get("label", job.stage)
        assert job.display_name == label and label, job.work
    assert any("label" in type(job).model_fields for job, _, _ in TABLE)


def test_a_model_that_is_told_of_its_images_has_other_inputs_for_other_captions(
    tmp_path: Path, context: JobContext
) -> None:
    cats, dogs = (
        two_classes(tmp_path),
        two_classes(tmp_path).model_copy(update={"caption_template": "a {label} of mine"}),
    )
    grams = GramsJob(expert=ref("copy"), dataset=cats, low=100, high=500, spec=RegMeanSpec())
    assert digest(grams, context) != digest(grams.model_copy(update={"dataset": dogs}), context)
