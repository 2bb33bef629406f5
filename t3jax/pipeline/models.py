"""Rows as tokens, and fine-tuned language models, by the config."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from t3jax import checked, data, files, hosts
from t3jax.data.records import Record
from t3jax.digests import model_digest, rows_digest
from t3jax.finetuning import FinetuneConfig, merge_weights, train_weights
from t3jax.lm import LM, LMConfig, default_dtype, load_config, load_lm, save_hf
from t3jax.lm.adapter import save_adapter
from t3jax.lm.decoder import Lora
from t3jax.sections import narrow
from t3jax.settings import Settings


def encode(config: Settings, lm: LM, source: str) -> list[data.Example]:
    """Encodes the rows of a source."""
    return encode_rows(config, lm, data.load_dataset(source, config.tofu_dir))


def encode_rows(config: Settings, lm: LM, rows: Sequence[Record]) -> list[data.Example]:
    """Encodes rows."""
    return data.encode_records(
        lm.tokenizer, rows, config.prompt_format, config.max_length or lm.max_position
    )


def finetune_config(config: Settings) -> FinetuneConfig:
    """The recipe of the language model's fine-tuning."""
    return narrow(
        FinetuneConfig,
        config.finetune,
        dtype=config.dtype or default_dtype(),
        minnorm=config.minnorm if config.minnorm.share else None,
        tasks=len(config.finetune.data) if config.finetune.meta else None,
        reptile=config.finetune.meta == "reptile",
    )


def finetune_once(config: Settings, mesh: Mesh) -> pathlib.Path:
    """Fine-tunes the model or resumes it, writes a Hugging Face folder, and returns its path.

    A folder of the same model (weights, config and tokenizer, in any place), data and recipe is
    reused if its files match their checksums; a ValueError names a file that does not.
    """
    recipe = finetune_config(config)
    workdir = pathlib.Path(config["finetune.workdir"])
    made_by: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        "format": dataclasses.asdict(config.prompt_format),
        **{
            f"finetune_{name}": [[source, source_digest(config, source)] for source in sources]
            for name, sources in (
                ("data", config.finetune.data),
                ("validation", config.finetune.validation),
            )
        },
    }
    # Trained weights are float32; weights that LoRA freezes may have another dtype.
    lm = load_lm(config["model"], recipe.dtype if recipe.freezes_weights else "float32", mesh)
    made_by["model"] = model_digest(lm)
    record = workdir / "model" / "finetuning.json"
    made_by = json.loads(json.dumps(made_by))  # as it is read back
    if hosts.of_lead(hosts.is_lead() and _was_made_by(record, made_by)):
        return record.parent
    lm_config = load_config(config["model"])
    tasks = [encode(config, lm, source) for source in config.finetune.data]
    trained = train_weights(
        lm_config,
        lm.params,
        tasks if recipe.tasks else list(itertools.chain(*tasks)),
        recipe,
        validation=[
            row for source in config.finetune.validation for row in encode(config, lm, source)
        ],
        workdir=workdir,
        mesh=mesh,
        progress="fine-tuning",
    )
    if recipe.lora_rank and not recipe.tasks:
        lora = hosts.fetch(trained)
        if hosts.is_lead():
            _write_adapter(workdir / "adapter", lm_config, lora, recipe, config["model"])
    params = merge_weights(lm.params, trained, recipe, mesh)
    dtype = params["embed"]["weight"].dtype
    params = hosts.fetch_to_lead(params)
    if hosts.is_lead():
        with files.replacing_folder(workdir / "model") as folder:
            save_hf(folder, lm_config, params, list(lm.eos_ids), dtype)
            lm.tokenizer.save_pretrained(folder)
            sums = {
                str(path.relative_to(folder)): checked.file_checksum(path)
                for path in folder.rglob("*")
                if path.is_file()
            }
            checked.write_json(folder / record.name, {"made_by": made_by, "files": sums})
    hosts.wait_for(record)
    return record.parent


def _write_adapter(
    folder: pathlib.Path, lm_config: LMConfig, lora: Lora, recipe: FinetuneConfig, model: str
) -> None:
    try:
        with files.replacing_folder(folder) as temporary:
            save_adapter(temporary, lm_config, lora, recipe.lora_rank, recipe.lora_alpha, model)
    except ValueError as error:  # the merged model is written all the same
        print(f"no adapter is written: {error}")


def _was_made_by(record: pathlib.Path, made_by: Mapping[str, object]) -> bool:
    """Whether `made_by` made a fine-tuned folder; raises ValueError if its files have changed."""
    stored = checked.read_stored(record, checked.read_json)
    if stored is None or stored["made_by"] != made_by:
        return False
    for name, checksum in stored["files"].items():
        path = record.parent / name
        if not path.is_file() or checked.file_checksum(path) != checksum:
            raise ValueError(
                f"{path} is not the file that fine-tuning wrote (damaged, changed or missing); "
                f"remove {record.parent} to have it written anew from the run's last checkpoint"
            )
    return True


def source_digest(config: Settings, source: str) -> str:
    """Digest of the rows of a source."""
    return rows_digest(data.load_dataset(source, config.tofu_dir))
