"""What a repository of the Hub holds, and what the Hub refuses to put into one: the part of ``hub_server`` without HTTP."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import yaml

LFS_SUFFIXES = "7z arrow bin bz2 ckpt gif gz h5 hdf5 jpg mp4 npy npz parquet pickle pkl png pt pth safetensors tar zip".split()
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"


class Refusal(Exception):
    """An answer that the client turns into an error."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, **content: Any
    ) -> None:
        """
        :param status: HTTP status
        :param message: told to the user by the client
        :param code: what the client distinguishes equal statuses by
        :param headers: further ones of the answer
        :param content: further fields of the answer's body
        """
        super().__init__(message)
        self.status, self.content = status, {"error": message, **content}
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode(), **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Blob:
    """One content of one file."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def stored(self) -> bytes:
        """:return: what git holds, which is a pointer for large files"""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.lfs else self.content

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    def lfs_info(self, key: str) -> dict[str, Any]:
        """
        :param key: what the listing calls the hash
        :return: what listings say of large files only
        """
        info = {key: self.sha256, "size": len(self.content), "pointerSize": len(self.stored)}
        return {"lfs": info} if self.lfs else {}


class Files(dict[str, Blob]):
    """The files of a commit, by path."""

    def text(self, path: str) -> str:
        """:return: the text of a file, empty where there is none"""
        return self[path].content.decode(errors="replace") if path in self else ""

    def is_large(self, path: str) -> bool:
        """:return: whether the repository itself declares files of that name as large"""
        lines = self.text(".gitattributes").splitlines()
        return matches(path, (line.split()[0] for line in lines if "filter=lfs" in line))

    def declare_large(self) -> None:
        """Appends large files that no pattern declares to .gitattributes, as the Hub does."""
        undeclared = [path for path, blob in self.items() if blob.lfs and not self.is_large(path)]
        if undeclared:
            lines = "".join(f"{path} {LFS_ATTRIBUTES}\n" for path in undeclared)
            self[".gitattributes"] = Blob((self.text(".gitattributes") + lines).encode())

    def paths(self) -> list[str]:
        """:return: files and the folders that hold them"""
        parts = [path.split("/") for path in self]
        return sorted({"/".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)})

    def entry(self, path: str) -> dict[str, Any]:
        """:return: what a listing says of a file or folder"""
        if path not in self:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        blob = self[path]
        return {"type": "file", "path": path, "oid": blob.git_id, "size": len(blob.content), **blob.lfs_info("oid")}


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    id: str
    title: str
    description: str
    author: str
    date: str
    files: Files


@dataclass
class Repository:
    """A repository with its history, oldest commit first, and the large files that its commits may name."""

    kind: str
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, Blob] = field(default_factory=dict)
    unverified: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def log(self, revision: str) -> list[Commit]:
        """:return: the commits up to the revision, the last one first"""
        ids = [commit.id for commit in self.commits]
        if revision != "main" and revision not in ids:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[len(ids) - 1 if revision == "main" else ids.index(revision) :: -1]

    def start(self, author: str) -> None:
        """
        Makes the first commit, which declares what the Hub takes for large files.

        :param author: name of an account
        """
        attributes = "".join(f"*.{suffix} {LFS_ATTRIBUTES}\n" for suffix in LFS_SUFFIXES)
        self._append(author, "initial commit", "", Files({".gitattributes": Blob(attributes.encode())}))

    def commit(self, author: str, header: Mapping[str, Any], operations: Iterable[Mapping[str, Any]], limit: int) -> Commit:
        """
        Does all operations or none.

        :param author: name of an account
        :param header: summary, and optionally description and the commit that has to be the head
        :param operations: each with its kind as ``key`` and what is to be done as ``value``
        :param limit: size in bytes of the largest regular file
        :return: the new head
        """
        if not header.get("summary"):
            raise Refusal(400, '"summary" is not allowed to be empty')
        if header.get("parentCommit") not in (None, self.commits[-1].id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = Files(self.commits[-1].files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"], limit)
        _, errors = card_data(files.text("README.md"))
        if errors:
            raise Refusal(400, "; ".join(errors))
        files.declare_large()
        return self._append(author, header["summary"], header.get("description", ""), files)

    def _append(self, author: str, title: str, description: str, files: Files) -> Commit:
        date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        content = [self.path, len(self.commits), title, date, *((path, blob.git_id) for path, blob in files.items())]
        id = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits.append(Commit(id, title, description, author, date, Files(sorted(files.items()))))
        return self.commits[-1]

    def _apply(self, files: Files, key: str, value: Mapping[str, Any], limit: int) -> None:
        """
        :param files: state, which the operation changes
        :param key: kind of the operation
        :param value: the operation
        :param limit: size in bytes of the largest regular file
        """
        folder = key == "deletedFolder"
        path = check_path(value["path"].rstrip("/") if folder else value["path"])
        if key == "file":
            files[path] = Blob(_decoded(value))
            if len(files[path].content) > limit:
                raise Refusal(400, f"{path} is too large for a regular file, upload it to LFS")
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
            files[path] = self.objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            removed = [name for name in files if (name.startswith(f"{path}/") if folder else name == path)]
            if not removed:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in removed:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation: {key}")


def matches(path: str, patterns: Iterable[str]) -> bool:
    """:return: whether one of the patterns, as git writes them, is about the path"""
    return any(fnmatch(path if "/" in pattern else path.rpartition("/")[2], pattern) for pattern in patterns)


def check_path(path: Any) -> str:
    """:return: the path, if a repository may hold it"""
    if not isinstance(path, str) or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refusal(400, f"Invalid path: {path}")
    return path


def card_data(text: str) -> tuple[dict[str, Any], list[str]]:
    """:return: the metadata of a card and what is wrong with it"""
    header = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else {}
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"]
    if not isinstance(data, dict):
        return {}, ["YAML Metadata Error: must be an object"]
    errors: list[str] = []
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    # Evaluations are shown only where the index is complete
    result = {"task": {"type": {}}, "dataset": {"name": {}, "type": {}}, "metrics": [{"type": {}, "value": {}}]}
    _check_fields(data.get("model-index", []), [{"name": {}, "results": [result]}], "model-index", errors)
    return data, errors


def _check_fields(value: Any, required: Any, name: str, errors: list[str]) -> None:
    """
    :param value: part of a card's metadata
    :param required: object of the fields that it needs, or list of one such object
    :param name: where the part is, for messages
    :param errors: gets what is missing
    """
    if isinstance(required, list):
        if not isinstance(value, list):
            errors.append(f'"{name}" must be an array')
            return
        for index, entry in enumerate(value):
            _check_fields(entry, required[0], f"{name}[{index}]", errors)
        return
    for key, below in required.items():
        if not isinstance(value, dict) or value.get(key) is None:
            errors.append(f'"{name}.{key}" is required')
        else:
            _check_fields(value[key], below, f"{name}.{key}", errors)


def _decoded(value: Mapping[str, Any]) -> bytes:
    """:return: the content of a regular file"""
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise Refusal(400, f"Invalid base64 of {value['path']}") from error
