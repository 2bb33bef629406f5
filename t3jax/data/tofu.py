"""TOFU, the benchmark of fictitious authors, as a TFDS dataset.

The builder reads the files of locuslab/TOFU, from the Hugging Face hub or from a local folder with
the hub's file names, and prepares them once as array_record; TensorFlow is not needed. Rows keep
the order of the files: retain90 = full[:3600], forget10 = full[3600:]. The hub's holdout splits
are not included.

Rows prepared from a local folder lie under a digest of its files, so that a changed folder is
prepared anew. The hub's files are a published set and are prepared once for a `VERSION`.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import huggingface_hub
import tensorflow_datasets as tfds

from t3jax.data.records import Record, parse_records

_HUB_REPOSITORY = "locuslab/TOFU"
# The splits of each config; the file of a split is SPLIT.json.
SPLITS = {
    "qa": ("full", "retain99", "retain95", "retain90", "forget10", "forget05", "forget01"),
    "perturbed": (
        "forget10_perturbed",
        "forget05_perturbed",
        "forget01_perturbed",
        "retain_perturbed",
        "real_authors_perturbed",
        "world_facts_perturbed",
    ),
}


class Tofu(tfds.core.GeneratorBasedBuilder):
    """TOFU: questions and answers about 200 fictitious authors (Maini et al., 2024).

    Two configs: "qa" with question and answer, "perturbed" (the evaluation sets) with a paraphrase
    and wrong answers too.

    Args:
        folder: folder with the hub's files; the splits whose file it lacks are left out. None:
            download the config's files from the Hugging Face hub.
        data_dir: root of the prepared data. None: TFDS's own (TFDS_DATA_DIR).
        **kwargs: as for any builder (config, version, file_format).

    Raises:
        FileNotFoundError: the folder does not exist or has none of TOFU's files.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SPLITS]  # noqa: RUF012

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ):
        self._origin = os.fspath(folder or _HUB_REPOSITORY)
        self._contents: dict[str, bytes] | None = None
        if folder is not None:
            # Read once: the folder's name is the digest of the bytes that are prepared.
            self._contents = _read_folder(pathlib.Path(folder))
            root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR)
            data_dir = root / f"tofu-{_digest(self._contents)}"
        kwargs.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = ["question", "answer"]
        features: dict[str, Any] = {}
        if self.builder_config.name == "perturbed":
            names += ["paraphrased_question", "paraphrased_answer"]
            features["perturbed_answer"] = tfds.features.Sequence(tfds.features.Text())
        features |= {name: tfds.features.Text() for name in names}
        return tfds.core.DatasetInfo(
            builder=self,
            description="TOFU, a task of fictitious unlearning: 200 fictitious authors, 20 "
            "question-answer pairs each.",
            features=tfds.features.FeaturesDict(features),
            homepage=f"https://huggingface.co/datasets/{_HUB_REPOSITORY}",
            citation="Maini et al., TOFU: A Task of Fictitious Unlearning for LLMs, COLM 2024, "
            "arXiv 2401.06121",
            license="MIT",
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, Record]]]:
        del dl_manager  # huggingface_hub has its own cache.
        splits = SPLITS[self.builder_config.name]
        contents = _download(splits) if self._contents is None else self._contents
        return {
            split: self._generate_examples(split, contents[split])
            for split in splits
            if split in contents
        }

    def _generate_examples(self, split: str, content: bytes) -> Iterator[tuple[int, Record]]:
        name = f"{self._origin}/{split}.json"
        for index, row in enumerate(parse_records(content, name)):
            where = f"{name}, row {index + 1}"
            if "text" in row:
                raise ValueError(f"{where}: expected a question and an answer, got a document")
            if self.builder_config.name == "perturbed":
                _check_perturbed(row, where)
            # The sets of real authors and world facts have no paraphrases.
            yield index, {field: row.get(field, "") for field in self.info.features}


def load_tofu(
    split: str,
    folder: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Loads a split of TOFU, and prepares it at the first call.

    Args:
        split: full, retain90/95/99, forget01/05/10, or with _perturbed: forget01/05/10, retain,
            real_authors, world_facts.
        folder: folder with the file of the split, named as on the hub (SPLIT.json), and with any of
            the others. None: download from the Hugging Face hub.
        data_dir: root of the prepared data. None: TFDS's own (TFDS_DATA_DIR).

    Returns:
        Rows in the file's order, text as str: question and answer; a _perturbed split also has
        paraphrased_question and paraphrased_answer ("" where the file has none) and
        perturbed_answer, a list of wrong answers.

    Raises:
        FileNotFoundError: the folder or the split's file does not exist.
        ConnectionError: the hub cannot be reached.
        ValueError: an unknown split, or a broken file.
    """
    configs = {split: name for name, splits in SPLITS.items() for split in splits}
    if split not in configs:
        raise ValueError(f"TOFU has no split {split!r}; expected one of {', '.join(configs)}")
    if folder is not None and not (file := pathlib.Path(folder) / f"{split}.json").is_file():
        raise FileNotFoundError(
            f"{file} does not exist: TOFU's split {split!r} is read from the file {file.name} in "
            f"the folder {folder}; put it there, or give no folder to download it"
        )

    def make_builder() -> Tofu:
        return Tofu(config=configs[split], folder=folder, data_dir=data_dir)

    builder = make_builder()
    try:
        builder.download_and_prepare()
    except OSError:
        # TFDS prepares in a temporary folder and renames it. The renaming fails if another process
        # was first; its data is used.
        builder = make_builder()
        if not builder.data_path.exists():
            raise
    source = builder.as_data_source(split=split)
    return [{field: _to_str(value) for field, value in row.items()} for row in source]


def _read_folder(folder: pathlib.Path) -> dict[str, bytes]:
    files = {split: folder / f"{split}.json" for splits in SPLITS.values() for split in splits}
    contents = {split: file.read_bytes() for split, file in files.items() if file.is_file()}
    if not contents:
        raise FileNotFoundError(
            f"the folder {folder} does not exist or has none of TOFU's files "
            f"{', '.join(file.name for file in files.values())}"
        )
    return contents


def _download(splits: Sequence[str]) -> dict[str, bytes]:
    contents = {}
    for split in splits:
        name = f"{split}.json"
        try:
            path = huggingface_hub.hf_hub_download(_HUB_REPOSITORY, name, repo_type="dataset")
        except OSError as error:
            raise ConnectionError(
                f"cannot download {name} of {_HUB_REPOSITORY} from the Hugging Face hub ({error}); "
                "give a local folder with TOFU's files instead"
            ) from error
        contents[split] = pathlib.Path(path).read_bytes()
    return contents


def _digest(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for split, content in sorted(contents.items()):
        digest.update(f"{split}:{len(content)}:".encode() + content)
    return digest.hexdigest()[:16]


def _check_perturbed(row: Record, where: str) -> None:
    wrong = row.get("perturbed_answer")
    if not (isinstance(wrong, list) and wrong and all(isinstance(a, str) and a for a in wrong)):
        raise ValueError(
            f"{where}: 'perturbed_answer' must be a list of wrong answers, got {wrong!r:.80}"
        )
    for field in ("paraphrased_question", "paraphrased_answer"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"{where}: {field!r} must be a string, got {row[field]!r:.80}")


def _to_str(value: bytes | Iterable[bytes]) -> str | list[str]:
    if isinstance(value, bytes):
        return value.decode()
    return [item.decode() for item in value]
