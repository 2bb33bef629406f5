"""The check that all files of a model that are read lie in its folder.

No code of a folder is ever run. A file outside of the folder is not read, whether an index names it
or a link leads to it. The snapshots of the Hugging Face cache are read: they are links into blobs
beside them.
"""

import pathlib

from t3jax.json_files import show_json

_READ = (".jinja", ".json", ".model", ".safetensors", ".txt")  # by the loader or a tokenizer
_TEMPLATES = "additional_chat_templates"


def check_links(folder: pathlib.Path) -> None:
    """Checks that the files to read lie in a model folder, which may itself be a link.

    Raises:
        ValueError: If a file is a link out of the folder and out of the Hugging Face cache that the
            folder belongs to, or is a pipe, a socket or a device.
    """
    folders = [path for path in (folder, folder / _TEMPLATES) if path.is_dir()]
    for path in sorted(path for parent in folders for path in parent.iterdir()):
        if path.suffix not in _READ and path.name != _TEMPLATES:
            continue
        check_inside(folder, path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: a pipe, a socket or a device; expected a regular file")


def check_inside(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Checks that a file of a model folder does not lead out of it.

    Raises:
        ValueError: If it lies, once links are followed, neither in the folder nor in the Hugging
            Face cache that the folder belongs to.
    """
    root, target = folder.resolve(), path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *_find_blobs(root))):
        raise ValueError(
            f"{path} leads out of the model folder, to {target}; nothing outside of it is read. "
            "Copy the file into the folder"
        )


def indexed_file(index: pathlib.Path, tensor: str, name: str, suffix: str = "") -> pathlib.Path:
    """The path of the file, maybe missing, that the index of a checkpoint names for a tensor.

    Raises:
        ValueError: If the name has another suffix, or is not of a file in the folder of the index.
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


def _find_blobs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of bytes, own or shared, of a snapshot in the Hugging Face cache."""
    snapshots, repository = folder.parent, folder.parent.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    return [repository / "blobs", repository.parent / "blobs"]
