"""The job at an output: its records, read back. Needs neither torch nor Ray, so every verb can use it."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from pipeline.config import JobRecord, Recipe
from pipeline.errors import NoSuchJob, OtherRecipe, StoreMissing
from pipeline.manifest import Manifest, load_plans
from pipeline.store import Store


def weights_key(recipe: Recipe) -> str:
    """Where the job's weights are in OUT."""
    return f"weights/{recipe.weights_sha256}.safetensors"


def golden_key(recipe: Recipe) -> str:
    """Where the CPU's features of the golden clip are in OUT."""
    return f"weights/{recipe.weights_sha256}.golden.json"


def read_job(store: Store) -> JobRecord:
    """The job at an output. NoSuchJob if there is none, DamagedJob if it was edited."""
    try:
        return JobRecord.from_json(store.read("job.json"), store.url)
    except StoreMissing:
        raise NoSuchJob(f"there is no job at {store.url}; `p3d launch SRC {store.url}` starts one") from None


def refuse_other_job(store: Store, recipe: Recipe) -> None:
    """OtherRecipe if the output belongs to a job with other settings, or holds something else altogether."""
    try:
        existing = read_job(store)
    except NoSuchJob:
        ours = ("_job/", "weights/", "plans/")  # a launch that was killed early leaves these
        stranger = next((info.key for info in store.list() if not info.key.startswith(ours)), None)
        if stranger is not None:
            raise OtherRecipe(
                f"{store.url} is not empty but holds no job ({stranger}); choose a new folder for the output"
            ) from None
        return
    recipe.refuse_other(existing.recipe, store.url)


def golden_of(store: Store, recipe: Recipe) -> npt.NDArray[np.float32]:
    """The CPU's features of the golden clip, made when the job was planned, [D] float32."""
    return np.array(json.loads(store.read(golden_key(recipe)))["features"], np.float32)


def manifests(store: Store, job: JobRecord) -> dict[int, Manifest]:
    """Every plan's manifest by plan_seq. DamagedJob if one cannot be trusted."""
    plans = load_plans(store)
    for plan in plans:
        if plan.recipe_digest != job.recipe.digest:
            raise OtherRecipe(f"{store.url}/{plan.folder} was made for another recipe than job.json holds; restore it")
    return {plan.seq: Manifest(store, plan) for plan in plans}
