"""A server on localhost that stands for the Hugging Face Hub, so that its real client can be tested without the internet.

It listens on two ports. One is the Hub:

- ``GET /api/whoami-v2``, ``POST /api/validate-yaml``, ``POST /api/repos/create``
- below ``/api/models/{repo}`` and ``/api/datasets/{repo}``: the repository's description (also ``/revision/{rev}``, with
  ``expand`` and ``blobs``), ``PUT settings`` (private or public), ``GET tree/{rev}/{path}``, ``GET commits/{rev}``,
  ``POST paths-info/{rev}``, ``POST preupload/{rev}``, ``POST commit/{rev}``
- ``POST [datasets/]{repo}.git/info/lfs/objects/batch`` and ``verify``, ``POST /api/complete_multipart``
- ``GET`` and ``HEAD`` of ``[datasets/]{repo}/resolve/{rev}/{path}``

The other one is the storage of large files, which the Hub keeps on other hosts: ``PUT`` of a file or of its parts, ``GET``
with ranges, both with signed addresses. It refuses requests that carry an authorization, which must not leave the Hub.

What is refused, and how, follows the answers of the Hub that are publicly known and what its client reads from them. Three
differences are on purpose. A missing repository is marked as such for anonymous users too: the client tells it from the
status 401 alone, but only over https. The metadata of cards is checked for syntax and for the fields that the Hub indexes,
not against its lists of licences and languages. A large file must be verified before a commit can name it.

Left out: Xet (``environment`` turns it off), branches, tags and pull requests, spaces, collections, moving and deleting
repositories, redirects of small files to a cache, last commits and security scans in listings, case-insensitive names.

A request for anything else gets 404 and a request that the server fails on 500; both are noted in ``unexpected``, which
tests assert to be empty.

``HF_ENDPOINT`` and the client's other variables are read when it is imported. Tests pass them to a process of their own
(``environment``), or pass ``endpoint`` and ``token`` to what they call.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_http import Call, Response, Service, ranged
from hub_repository import Blob, Commit, Refusal, Repository, card_data, check_path, matches


@dataclass
class User:
    """An account, as one of its tokens sees it."""

    name: str
    organizations: tuple[str, ...]
    role: str

    def may_read(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and self.may_read(namespace)


@dataclass
class Upload:
    """A large file on its way."""

    repo: Repository
    oid: str
    size: int
    chunk_size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class Route(NamedTuple):
    """Which requests a method answers."""

    server: str
    method: str
    path: re.Pattern[str]
    needs: str
    function: Callable[..., Response]


ROUTES: list[Route] = []


def route(
    server: str, method: str, path: str, needs: str = ""
) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """
    Names what a method answers.

    :param server: hub or storage
    :param method: HTTP method
    :param path: parts in braces are passed on, those with a star may hold slashes
    :param needs: read or write, of the repository that the path names
    :return: decorator
    """
    path = path.replace("{repo}", r"(?P<repo>[^/]+/[^/]+?)")
    path = re.sub(r"\{\*(\w+)\}", r"(?P<\1>.+)", path)
    path = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append(Route(server, method, re.compile(path), needs, function))
        return function

    return register


API, PAGES = "/api/(?P<kind>models|datasets)/{repo}", "/(?:(?P<kind>datasets)/)?{repo}"


class HubServer(Service):
    """The Hub of one test; see the top of this file."""

    def __init__(
        self,
        *,
        lfs_above: int = 10_000_000,
        multipart_above: int = 20_000_000,
        chunk_size: int = 5_000_000,
        page_size: int = 1000,
    ) -> None:
        """
        :param lfs_above: size in bytes of the largest regular file
        :param multipart_above: size in bytes of the largest file that is uploaded in one piece
        :param chunk_size: size in bytes of the pieces of larger ones
        :param page_size: most entries that a listing gives at once
        """
        self.lfs_above, self.multipart_above = lfs_above, multipart_above
        self.chunk_size, self.page_size = chunk_size, page_size
        super().__init__("hub", "storage")
        self.url, self.storage_url = self.address("hub"), self.address("storage")
        self.unexpected: list[str] = []
        self._users: dict[str, User] = {}
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._uploads: dict[str, Upload] = {}
        self._secret = secrets.token_bytes()
        self.token = self.add_user("tester", "team")

    # What tests use

    def add_user(self, name: str, *organizations: str, role: str = "write") -> str:
        """
        :param name: account, which is also the namespace of its own repositories
        :param organizations: whose repositories it may read, and write with a token for that
        :param role: of the token, read or write
        :return: token
        """
        token = f"hf_{secrets.token_hex(17)}"
        self._users[token] = User(name, organizations, role)
        return token

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """
        :param home: folder for the client's cache
        :param token: that of the first user where it is not given, none where it is empty
        :return: variables that make the client of another process use this server
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            # A tester's own settings would win against the folder
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_TOKEN_PATH": f"{home}/token",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """:return: the content of all files at a revision"""
        commit = self._repositories[f"{repo_type}s", repo_id].log(revision)[0]
        return {path: blob.content for path, blob in commit.files.items()}

    def history(self, repo_id: str, repo_type: str = "model") -> list[Commit]:
        """:return: all commits, the last one first"""
        return self._repositories[f"{repo_type}s", repo_id].log("main")

    # What requests go through

    def answer(self, server: str, call: Call) -> Response:
        with self._lock:
            try:
                return self._dispatch(server, call)
            except Refusal as refusal:
                return Response.of(refusal.content, refusal.status, **refusal.headers)
            except Exception:
                self.unexpected.append(f"{server}: {call.method} {call.path}\n{traceback.format_exc()}")
                return Response(500)

    def _dispatch(self, server: str, call: Call) -> Response:
        method = "GET" if call.method == "HEAD" else call.method
        found = ((row, row.path.fullmatch(call.path)) for row in ROUTES if (row.server, row.method) == (server, method))
        row, match = next(((row, match) for row, match in found if match), (None, None))
        if row is None:
            self.unexpected.append(f"{server}: {call.method} {call.path}")
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        values = {name: unquote(value) if value else "" for name, value in match.groupdict().items()}
        if server == "hub":
            call.user = self._user(call)
        if row.needs:
            values["repo"] = self._repository(values.pop("kind") or "models", values["repo"], call.user, row.needs)
        return row.function(self, call, **values)

    def _user(self, call: Call) -> User | None:
        header = call.headers.get("Authorization")
        if header is not None and header.removeprefix("Bearer ") not in self._users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self._users[header.removeprefix("Bearer ")] if header else None

    def _repository(self, kind: str, id: str, user: User | None, needs: str) -> Repository:
        """:return: the repository, if the user may do with it what the request needs"""
        repo = self._repositories.get((kind, id))
        namespace = id.split("/")[0]
        hidden = repo is None or (repo.private and (user is None or not user.may_read(namespace)))
        if user is None and (hidden or needs == "write"):
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if needs == "write" and not user.may_write(namespace):
            raise Refusal(403, "Forbidden: you must use a write token of the repository's owner to upload to it")
        return repo

    def _page(self, call: Call, entries: list[Any]) -> Response:
        """:return: the part of a listing that is asked for, with the address of the next one"""
        start = int(call.query.get("cursor", ["0"])[0])
        rest = {key: values for key, values in call.query.items() if key != "cursor"}
        parameters = [f"{quote(key)}={quote(value)}" for key, values in rest.items() for value in values]
        following = "&".join([*parameters, f"cursor={start + self.page_size}"])
        more = start + self.page_size < len(entries)
        link = {"Link": f'<{self.url}{call.path}?{following}>; rel="next"'} if more else {}
        return Response.of(entries[start : start + self.page_size], **link)

    # Accounts and repositories

    @route("hub", "GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Response:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        user, token = call.user, {"displayName": "tests", "role": call.user.role}
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        content = {"type": "user", "name": user.name, "fullname": user.name, "orgs": organizations}
        return Response.of({**content, "auth": {"type": "access_token", "accessToken": token}})

    @route("hub", "POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Response:
        data, errors = card_data(str(call.json().get("content")))
        warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
        content = {"errors": [{"message": error} for error in errors], "warnings": [{"message": text} for text in warnings]}
        return Response.of(content, 400 if errors else 200)

    @route("hub", "POST", "/api/repos/create")
    def _create(self, call: Call) -> Response:
        content = call.json()
        kind, name = f"{content.get('type') or 'model'}s", content.get("name")
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        if kind not in ("models", "datasets") or not re.fullmatch(r"\w(?:[\w.-]{0,94}\w)?", str(name), re.ASCII):
            raise Refusal(400, "Invalid type or name of a repository")
        namespace = content.get("organization") or call.user.name
        if not call.user.may_write(namespace):
            message = f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"'
            raise Refusal(403, message)
        repo = Repository(kind, f"{namespace}/{name}", content.get("visibility") == "private")
        place = {"url": f"{self.url}/{repo.path}", "name": repo.id}
        if (kind, repo.id) in self._repositories:
            # The client takes the address of a repository that may exist from the refusal
            raise Refusal(409, f"You already created this {kind[:-1]} repo", **place)
        repo.start(call.user.name)
        self._repositories[kind, repo.id] = repo
        return Response.of(place)

    @route("hub", "PUT", API + "/settings", "write")
    def _settings(self, call: Call, repo: Repository) -> Response:
        visibility = call.json().get("visibility")
        if visibility not in ("private", "public"):
            raise Refusal(400, "Only the visibility can be set here")
        repo.private = visibility == "private"
        return Response.of({"private": repo.private})

    @route("hub", "GET", API + "(?:/revision/{revision})?", "read")
    def _info(self, call: Call, repo: Repository, revision: str) -> Response:
        commit = repo.log(revision or "main")[0]
        card, _ = card_data(commit.files.text("README.md"))
        siblings = []
        for path, blob in commit.files.items():
            sizes = {"size": len(blob.content), "blobId": blob.git_id, **blob.lfs_info("sha256")}
            siblings.append({"rfilename": path, **(sizes if call.flag("blobs") else {})})
        info = {
            "author": repo.id.split("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "createdAt": repo.commits[0].date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": siblings,
        }
        if repo.kind == "models":
            info |= {"library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")}
            info["model-index"] = card.get("model-index")
        expand = [*call.query.get("expand", []), *call.query.get("expand[]", [])]
        if set(expand) - set(info):
            raise Refusal(400, f"Invalid value of expand: {expand}")
        return Response.of({"id": repo.id, **{key: info[key] for key in expand or info}})

    @route("hub", "GET", API + "/commits/{revision}", "read")
    def _commits(self, call: Call, repo: Repository, revision: str) -> Response:
        entries = []
        for commit in repo.log(revision):
            text = {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date}
            entries.append({**text, "authors": [{"user": commit.author}]})
        return self._page(call, entries)

    @route("hub", "GET", API + "/tree/{revision}(?:/{*folder})?", "read")
    def _tree(self, call: Call, repo: Repository, revision: str, folder: str) -> Response:
        files = repo.log(revision)[0].files
        entries = [files.entry(path) for path in files.paths() if not folder or path.startswith(f"{folder}/")]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        depth = len(folder.split("/")) + 1 if folder else 1
        return self._page(call, [e for e in entries if call.flag("recursive") or len(e["path"].split("/")) == depth])

    @route("hub", "POST", API + "/paths-info/{revision}", "read")
    def _paths_info(self, call: Call, repo: Repository, revision: str) -> Response:
        files = repo.log(revision)[0].files
        wanted = parse_qs(call.body.decode()).get("paths", [])
        return Response.of([files.entry(path) for path in files.paths() if path in wanted])

    # Uploads

    @route("hub", "POST", API + "/preupload/{revision}", "write")
    def _preupload(self, call: Call, repo: Repository, revision: str) -> Response:
        files = repo.log(revision)[0].files
        ignored = call.json().get("gitIgnore") or files.text(".gitignore")
        answers = []
        for entry in call.json()["files"]:
            path = check_path(entry["path"])
            # The sample of the first bytes is there to tell binary files from text
            large = entry["size"] > self.lfs_above or b"\0" in base64.b64decode(entry["sample"])
            mode = "lfs" if large or files.is_large(path) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": matches(path, ignored.split())}
            answers.append({**answer, "oid": files[path].etag if path in files else None})
        return Response.of({"files": answers})

    @route("hub", "POST", PAGES + r"\.git/info/lfs/objects/batch", "write")
    def _batch(self, call: Call, repo: Repository) -> Response:
        content = call.json()
        if content.get("operation") != "upload" or content.get("hash_algo", "sha256") != "sha256":
            raise Refusal(422, "Only uploads with SHA-256 are known here")
        transfers = content.get("transfers", ["basic"])
        objects = [self._batch_object(repo, entry["oid"], entry["size"], transfers) for entry in content["objects"]]
        return Response.of({"transfer": "basic", "objects": objects})

    def _batch_object(self, repo: Repository, oid: str, size: int, transfers: list[str]) -> dict[str, Any]:
        result: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid) or size < 0:
            return {**result, "error": {"code": 422, "message": "Invalid hash or size"}}
        if oid in repo.objects:
            return result
        parts = size > self.multipart_above and "multipart" in transfers
        id = secrets.token_hex(8)
        self._uploads[id] = Upload(repo, oid, size, self.chunk_size if parts else max(size, 1))
        if parts:
            numbers = range(1, ceil(size / self.chunk_size) + 1)
            header = {f"{number:05}": self._sign("PUT", f"{self.storage_url}/{id}/{number}") for number in numbers}
            upload = {"href": self._sign("POST", f"{self.url}/api/complete_multipart/{id}")}
            upload["header"] = {"chunk_size": str(self.chunk_size), **header}
        else:
            upload = {"href": self._sign("PUT", f"{self.storage_url}/{id}/1")}
        verify = {"href": f"{self.url}/{repo.path}.git/info/lfs/objects/verify"}
        return {**result, "actions": {"upload": upload, "verify": verify}}

    @route("hub", "POST", "/api/complete_multipart/{id}")
    def _complete(self, call: Call, id: str) -> Response:
        self._check_signature(call)
        upload, content = self._uploads[id], call.json()
        etags = {number: hashlib.md5(part).hexdigest() for number, part in upload.parts.items()}
        given = [(part["partNumber"], part["etag"].strip('"')) for part in content["parts"]]
        if content["oid"] != upload.oid or given != sorted(etags.items()):
            raise Refusal(400, "The parts are not those that were uploaded")
        upload.repo.unverified[upload.oid] = b"".join(upload.parts[number] for number, _ in given)
        return Response.of({"success": True})

    @route("hub", "POST", PAGES + r"\.git/info/lfs/objects/verify", "write")
    def _verify(self, call: Call, repo: Repository) -> Response:
        content = call.json()
        # Asked again where the answer was lost
        blob = repo.objects.get(content["oid"]) or Blob(repo.unverified.pop(content["oid"], b""), lfs=True)
        if (blob.sha256, len(blob.content)) != (content["oid"], content["size"]):
            raise Refusal(422, "The content has another size or hash, or was not uploaded")
        repo.objects[blob.sha256] = blob
        return Response.of({"message": "Object verified"})

    @route("hub", "POST", API + "/commit/{revision}", "write")
    def _commit(self, call: Call, repo: Repository, revision: str) -> Response:
        if revision != "main" or call.flag("create_pr"):
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = _operations(call)
        commit = repo.commit(call.user.name, header, operations, self.lfs_above)
        url = f"{self.url}/{repo.path}/commit/{commit.id}"
        return Response.of({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})

    # Downloads and the storage

    @route("hub", "GET", PAGES + "/resolve/{revision}/{*path}", "read")
    def _resolve(self, call: Call, repo: Repository, revision: str, path: str) -> Response:
        commit = repo.log(revision)[0]
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.id}
        if blob is None:
            # The client remembers at which commit the file is missing
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        if not blob.lfs:
            return ranged(call, blob.content, {**headers, "ETag": f'"{blob.etag}"'})
        place = self._sign("GET", f"{self.storage_url}/{repo.kind}/{repo.id}/{blob.sha256}")
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"', "Location": place}
        return Response(302, b"", {**headers, **linked})

    @route("storage", "PUT", "/{id}/{number}")
    def _store(self, call: Call, id: str, number: str) -> Response:
        self._check_signature(call)
        if "Transfer-Encoding" in call.headers:
            raise Refusal(501, "A header you provided implies functionality that is not implemented")
        upload, index = self._uploads[id], int(number)
        if len(call.body) != min(upload.chunk_size, upload.size - (index - 1) * upload.chunk_size):
            raise Refusal(400, "The part has not the size that was announced")
        upload.parts[index] = call.body
        if upload.size <= upload.chunk_size:
            upload.repo.unverified[upload.oid] = call.body
        return Response(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})

    @route("storage", "GET", "/{kind}/{repo}/{oid}")
    def _load(self, call: Call, kind: str, repo: str, oid: str) -> Response:
        self._check_signature(call)
        return ranged(call, self._repositories[kind, repo].objects[oid].content, {"ETag": f'"{oid}"'})

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), "sha256").hexdigest()

    def _sign(self, method: str, url: str) -> str:
        return f"{url}?signature={self._signature(method, urlsplit(url).path)}"

    def _check_signature(self, call: Call) -> None:
        if "Authorization" in call.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        method = "GET" if call.method == "HEAD" else call.method
        if call.query.get("signature") != [self._signature(method, call.path)]:
            raise Refusal(403, "The request signature we calculated does not match the signature you provided")


def _operations(call: Call) -> list[dict[str, Any]]:
    """:return: header of a commit, then its operations"""
    try:
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        valid = header["key"] == "header" and all({"key", "value"} <= operation.keys() for operation in operations)
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid or "application/x-ndjson" not in call.headers.get("Content-Type", ""):
        raise Refusal(400, "A commit is a header and operations, one JSON object per line")
    return [header["value"], *operations]
