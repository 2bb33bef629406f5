"""The files of a model folder: which of them may be read, and where each must lie.

Nothing of a folder is ever run. What is read of it lies in it: neither a name in one of its files
nor a link leads elsewhere. The snapshots of the Hugging Face cache are all links, into blobs beside
them, and go on being read.
"""

import pathlib

from t3jax.json_files import show_json

_READ = (".jinja", ".json", ".model", ".safetensors", ".txt")  # by the loader or a tokenizer
_TEMPLATES = "additional_chat_templates"


def check_links(folder: pathlib.Path) -> None:
    """Checks that what is read of a model folder lies in it, and is there to be read.

    Args:
        folder: The folder; may itself be a link.

    Raises:
        ValueError: If a file is a link out of the folder and out of the Hugging Face cache that the
            folder belongs to, or is a pipe, a socket or a device.
    """
    folders = [place for place in (folder, folder / _TEMPLATES) if place.is_dir()]
    for path in sorted(path for place in folders for path in place.iterdir()):
        if path.suffix not in _READ and path.name != _TEMPLATES:
            continue
        check_inside(folder, path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: a pipe, a socket or a device; expected a regular file")


def check_inside(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Checks that a file of a model folder does not lead out of it.

    Args:
        folder: The folder.
        path: The file, links in its path not yet followed.

    Raises:
        ValueError: If it lies, once links are followed, neither in the folder nor in the Hugging
            Face cache that the folder belongs to.
    """
    place, target = folder.resolve(), path.resolve()
    if not any(target.is_relative_to(root) for root in (place, *_blobs(place))):
        raise ValueError(
            f"{path} leads out of the model folder, to {target}; nothing outside of it is read. "
            "Copy the file into the folder"
        )


def indexed_file(index: pathlib.Path, tensor: str, name: str, suffix: str = "") -> pathlib.Path:
    """Finds the file that an index of a checkpoint in shards names for a tensor.

    Args:
        index: The index.
        tensor: The tensor.
        name: The file that the index names for it.
        suffix: How the name must end.

    Returns:
        The file, which may be missing.

    Raises:
        ValueError: If it does not lie in the folder of the index.
    """
    plain = name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
    if not plain or not name.endswith(suffix):
        kind = f"{suffix} file".lstrip()
        raise ValueError(
            f"{index}: weight_map names no file to read: {tensor} is in {show_json(name)}, "
            f"expected the name of a {kind} in the same folder"
        )
    check_inside(index.parent, index.parent / name)
    return index.parent / name


def _blobs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Where the snapshots of the Hugging Face cache have their bytes: their own, or shared ones."""
    snapshots, repository = folder.parent, folder.parent.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    return [repository / "blobs", repository.parent / "blobs"]
