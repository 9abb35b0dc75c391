import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from hub_http import DROP_REQUEST, DROP_RESPONSE, SLOW
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The client's own use of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "team/dqn-CartPole-v1"
CARD = textwrap.dedent(
    """\
    ---
    library_name: sb3-ext
    tags: [CartPole-v1, dqn]
    model-index:
    - name: dqn
      results:
      - task: {type: reinforcement-learning, name: reinforcement-learning}
        dataset: {name: CartPole-v1, type: CartPole-v1}
        metrics: [{type: mean_reward, value: 500.00 +/- 0.00}]
    ---
    # DQN
    """
)
# A text, and files that their suffix, their bytes and their size make large, the last of which goes up in parts
FILES = {
    "README.md": CARD.encode(),
    "folder/model.safetensors": b"weights",
    "icon.webp": b"RIFF\0",
    "log.csv": b"1,2,3\n" * 200,
    "replay.webm": b"\0frame" * 1000,
}
# Addresses in the storage of large files
STORAGE = r"^/\w+/\d\?signature"
NETWORK_ERRORS = (httpx2.NetworkError, httpx2.RemoteProtocolError)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(lfs_above=1000, multipart_above=3000, chunk_size=2500, page_size=3) as server:
        yield server
    assert server.unexpected == []


@pytest.fixture
def api(server: HubServer) -> HfApi:
    api = HfApi(endpoint=server.url, token=server.token)
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "pushed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "pushed"


@pytest.fixture
def pushed(api: HfApi, folder: Path) -> HfApi:
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    return api


def download(server: HubServer, cache: Path, name: str, **kwargs: object) -> bytes:
    kwargs = {"repo_id": REPO, "endpoint": server.url, "token": server.token, "cache_dir": cache, **kwargs}
    return Path(hf_hub_download(filename=name, **kwargs)).read_bytes()


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def methods(server: HubServer, pattern: str) -> list[tuple[str, int]]:
    return [(request.method, request.status) for request in server.requests if pattern in request.path]


# Pushing and reading back


def test_what_is_pushed_is_read_back(server, pushed, folder, tmp_path):
    assert without_attributes(server.files(REPO)) == FILES
    # Three files in one piece and one in three
    assert sorted(methods(server, "?signature")) == [("POST", 200)] + [("PUT", 200)] * 6
    path = Path(snapshot_download(REPO, endpoint=server.url, token=server.token, cache_dir=tmp_path / "cache"))
    read = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert read == server.files(REPO)
    assert b"replay.webm filter=lfs" in read[".gitattributes"] and b"README.md" not in read[".gitattributes"]


def test_the_token_goes_to_the_hub_alone(server, pushed, tmp_path):
    download(server, tmp_path, "replay.webm")
    storage = [request for request in server.requests if request.server == "storage"]
    assert {request.method for request in storage} == {"PUT", "GET"} and not any(request.authorized for request in storage)
    hub = [request.path for request in server.requests if request.server == "hub" and not request.authorized]
    assert all(path.startswith("/api/complete_multipart") for path in hub)
    assert not any(server.token in request.path for request in server.requests)


def test_descriptions_and_listings(server, pushed):
    info = pushed.repo_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.private, info.sha) == (REPO, "team", False, server.history(REPO)[0].id)
    assert info.library_name == "sb3-ext" and info.tags == ["CartPole-v1", "dqn"]
    assert info.model_index[0]["results"][0]["metrics"][0]["value"] == "500.00 +/- 0.00"
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    weights = siblings["folder/model.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(b"weights").hexdigest() and weights.size == 7
    assert siblings["README.md"].lfs is None
    assert pushed.repo_info(REPO, expand=["sha"]).siblings is None
    # The listing has more than one page
    assert sorted(pushed.list_repo_files(REPO)) == sorted([".gitattributes", *FILES])
    assert len(methods(server, "/tree/main")) == 3
    assert "folder" in [entry.path for entry in pushed.list_repo_tree(REPO)]
    assert [entry.path for entry in pushed.list_repo_tree(REPO, "folder")] == ["folder/model.safetensors"]
    [entry] = pushed.get_paths_info(REPO, ["README.md", "missing"])
    assert entry.blob_id == siblings["README.md"].blob_id
    assert pushed.whoami()["name"] == "tester" and pushed.file_exists(REPO, "log.csv")
    assert not pushed.file_exists(REPO, "missing")
    metadata = pushed.get_hf_file_metadata(url=f"{server.url}/{REPO}/resolve/main/folder/model.safetensors")
    assert (metadata.size, metadata.etag, metadata.commit_hash) == (7, weights.lfs.sha256, info.sha)
    assert metadata.location.startswith(server.storage_url)


def test_a_second_download_transfers_nothing(server, pushed, tmp_path):
    for name, content in FILES.items():
        assert download(server, tmp_path, name) == content
    server.requests.clear()
    for name, content in FILES.items():
        assert download(server, tmp_path, name) == content
    assert {request.method for request in server.requests} == {"HEAD"}
    pushed.upload_file(repo_id=REPO, path_or_fileobj=b"new", path_in_repo="folder/model.safetensors")
    assert download(server, tmp_path, "folder/model.safetensors") == b"new"


def test_updates_keep_the_history(server, pushed, folder, tmp_path):
    first = server.history(REPO)[0].id
    (folder / "README.md").write_text(CARD + "better")
    server.requests.clear()
    second = pushed.upload_folder(repo_id=REPO, folder_path=folder, commit_message="second", commit_description="why")
    # What has not changed is not uploaded again
    assert [request for request in server.requests if request.server == "storage"] == []
    commits = pushed.list_repo_commits(REPO)
    assert [commit.title for commit in commits] == ["second", "first", "initial commit"]
    assert (commits[0].commit_id, commits[0].message, commits[0].authors) == (second.oid, "why", ["tester"])
    assert download(server, tmp_path, "README.md", revision=first) == CARD.encode()
    assert download(server, tmp_path, "README.md") == CARD.encode() + b"better"
    assert pushed.upload_folder(repo_id=REPO, folder_path=folder).oid == second.oid and len(server.history(REPO)) == 3


def test_files_and_folders_are_deleted(server, pushed):
    pushed.delete_file("log.csv", REPO)
    assert set(FILES) - set(server.files(REPO)) == {"log.csv"}
    pushed.upload_file(repo_id=REPO, path_or_fileobj=b"text", path_in_repo="folder.txt")
    pushed.delete_folder("folder", REPO)
    assert server.files(REPO)["folder.txt"] == b"text"
    assert set(FILES) - set(server.files(REPO)) == {"log.csv", "folder/model.safetensors"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        pushed.delete_file("folder/model.safetensors", REPO)
    assert len(server.history(REPO)) == 5


def test_datasets_are_beside_models(server, pushed, tmp_path):
    pushed.create_repo(REPO, repo_type="dataset")
    pushed.upload_file(repo_id=REPO, repo_type="dataset", path_or_fileobj=b"\0data", path_in_repo="main_data.hdf5")
    assert without_attributes(server.files(REPO, repo_type="dataset")) == {"main_data.hdf5": b"\0data"}
    assert download(server, tmp_path, "main_data.hdf5", repo_type="dataset") == b"\0data"
    assert pushed.dataset_info(REPO).siblings[-1].rfilename == "main_data.hdf5"
    assert without_attributes(server.files(REPO)) == FILES


def test_the_environment_of_another_process(server, pushed, tmp_path):
    # A client of a server of another address fails on existing repositories that the token may not write to
    code = """
        import json, sys
        from huggingface_hub import ModelCard, create_repo, hf_hub_download, upload_file
        repo, token = sys.argv[1:]
        create_repo(repo, exist_ok=True, token=token)
        upload_file(repo_id=repo, path_or_fileobj=b"weights", path_in_repo="other.safetensors")
        print(json.dumps([ModelCard.load(repo).text, hf_hub_download(repo, "other.safetensors")]))
    """
    env = {**os.environ, **server.environment(tmp_path / "home")}
    command = [sys.executable, "-c", textwrap.dedent(code), REPO, server.add_user("stranger")]
    card, path = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    assert card == "# DQN\n" and Path(path).read_bytes() == b"weights"
    assert Path(path).is_relative_to(tmp_path / "home")
    assert ("POST", 403) in methods(server, "/api/repos/create")


# Who may do what


def test_existing_repositories(server, api):
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo("mine").repo_id == "tester/mine"
    with pytest.raises(BadRequestError, match="Invalid type or name"):
        api.create_repo("team/mine", repo_type="space", space_sdk="static")


def test_private_repositories(server, api, tmp_path):
    api.create_repo("team/private", private=True)
    api.upload_file(repo_id="team/private", path_or_fileobj=b"text", path_in_repo="a.txt")
    assert download(server, tmp_path / "1", "a.txt", repo_id="team/private") == b"text"
    for token, status in ((False, 401), (server.add_user("stranger"), 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            download(server, tmp_path / "2", "a.txt", repo_id="team/private", token=token)
        assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info("team/private", token=token)
    api.update_repo_settings("team/private", private=False)
    assert download(server, tmp_path / "2", "a.txt", repo_id="team/private", token=False) == b"text"


def test_wrong_tokens(server, pushed, folder):
    token = "hf_" + "x" * 34
    for call in (
        lambda: pushed.repo_info(REPO, token=token),
        lambda: pushed.create_repo("team/other", token=token),
        lambda: pushed.upload_folder(repo_id=REPO, folder_path=folder / "folder", token=token),
    ):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as error:
            call()
        assert error.value.response.status_code == 401 and not isinstance(error.value, RepositoryNotFoundError)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        pushed.whoami(token=token)
    with pytest.raises(RepositoryNotFoundError):
        pushed.upload_folder(repo_id=REPO, folder_path=folder / "folder", token=False)
    assert len(server.history(REPO)) == 2


@pytest.mark.parametrize("user", [("stranger", "write"), ("tester", "read")])
def test_missing_permission(server, pushed, user):
    token = server.add_user(user[0], *(["team"] if user[1] == "read" else []), role=user[1])
    assert pushed.repo_info(REPO, token=token).id == REPO
    for call in (
        lambda: pushed.create_repo("team/other", exist_ok=True, token=token),
        lambda: pushed.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a.txt", token=token),
    ):
        with pytest.raises(HfHubHTTPError, match=r"have the rights to create|must use a write token") as error:
            call()
        assert error.value.response.status_code == 403
    assert len(server.history(REPO)) == 2


def test_missing_things(server, pushed, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        download(server, tmp_path, "a", repo_id="team/missing")
    with pytest.raises(RepositoryNotFoundError):
        pushed.upload_file(repo_id="team/missing", path_or_fileobj=b"", path_in_repo="a.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        download(server, tmp_path, "missing")
    with pytest.raises(RemoteEntryNotFoundError):
        list(pushed.list_repo_tree(REPO, "missing"))
    with pytest.raises(RevisionNotFoundError):
        download(server, tmp_path, "log.csv", revision="0" * 40)
    with pytest.raises(RevisionNotFoundError):
        pushed.upload_file(repo_id=REPO, path_or_fileobj=b"", path_in_repo="a.txt", revision="branch")


# Faults


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/preupload/", 503),
        ("/objects/batch", 429),
        ("complete_multipart", DROP_RESPONSE),
        ("/objects/verify", DROP_RESPONSE),
        (STORAGE, 429),
        (STORAGE, 503),
        (STORAGE, DROP_REQUEST),
        (STORAGE, DROP_RESPONSE),
    ],
)
def test_the_client_repeats_uploads(server, api, folder, path, how):
    fault = server.fail(path, how)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert fault.times == 0 and without_attributes(server.files(REPO)) == FILES


@pytest.mark.parametrize("path", ["validate-yaml", "/commit/"])
@pytest.mark.parametrize("how", [429, 503, DROP_REQUEST, DROP_RESPONSE])
def test_what_the_client_does_not_repeat_can_be_repeated(server, api, folder, path, how):
    fault = server.fail(path, how)
    with pytest.raises((HfHubHTTPError, *NETWORK_ERRORS, ValueError)):
        api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="push")
    assert fault.times == 0
    # All or nothing: only a commit whose answer was lost is there
    done = path == "/commit/" and how == DROP_RESPONSE
    assert without_attributes(server.files(REPO)) == (FILES if done else {})
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="push")
    assert without_attributes(server.files(REPO)) == FILES
    assert [commit.title for commit in server.history(REPO)] == ["push", "initial commit"]


def test_an_upload_that_is_cut_while_it_is_sent(server, api):
    server.multipart_above = 10_000_000
    content = b"\0" * 8_000_000
    fault = server.fail(STORAGE, DROP_REQUEST)
    api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo="a.zip")
    assert fault.times == 0 and server.files(REPO)["a.zip"] == content
    assert methods(server, "/1?signature") == [("PUT", 0), ("PUT", 200)]


def test_uploads_that_never_succeed(server, api, folder):
    fault = server.fail(STORAGE, 403)
    with pytest.raises(RuntimeError, match=r"Error while uploading '.*' to the Hub"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert fault.times == 0 and len(server.history(REPO)) == 1
    assert methods(server, "/commit/") == []


def test_downloads_continue_where_they_were_cut(server, pushed, tmp_path, monkeypatch):
    # What is cut within the first chunk starts anew
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10)
    for name in ("replay.webm", "README.md"):
        server.requests.clear()
        server.fail("", DROP_RESPONSE, method="GET")
        # A small file comes from the Hub itself, a large one after a redirect
        pattern = "?signature" if name == "replay.webm" else "/resolve/"
        assert download(server, tmp_path, name) == FILES[name]
        assert methods(server, pattern)[-1] == ("GET", 206), name


@pytest.mark.parametrize("how", [429, 503])
def test_overloaded_downloads(server, pushed, tmp_path, how):
    fault = server.fail("/resolve/", how, method="HEAD")
    assert download(server, tmp_path, "replay.webm") == FILES["replay.webm"]
    assert fault.times == 0
    assert methods(server, "/resolve/")[0] == ("HEAD", how)


def test_requests_without_body_are_cut_too(server, pushed):
    for how in (DROP_REQUEST, DROP_RESPONSE):
        server.fail("/api/models/", how)
        with pytest.raises(NETWORK_ERRORS):
            pushed.repo_info(REPO)
    assert methods(server, f"/api/models/{REPO}")[-2:] == [("GET", 0), ("GET", 200)]


def test_the_rate_limit_is_told(server, pushed):
    server.fail("/api/models/", 429, seconds=30)
    with pytest.raises(HfHubHTTPError, match="Retry after 30 seconds"):
        pushed.repo_info(REPO)


def test_slow_answers(server, pushed):
    server.fail("/api/models/", SLOW, seconds=0.5)
    with pytest.raises(httpx2.TimeoutException):
        pushed.repo_info(REPO, timeout=0.05)
    assert pushed.repo_info(REPO, timeout=5).id == REPO


# Refusals of what the client would not send


def commit(server: HubServer, *operations: tuple[str, dict], **header: object) -> httpx2.Response:
    lines = [("header", {"summary": "push", **header}), *operations]
    content = "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines)
    return post(server, f"/api/models/{REPO}/commit/main", content=content, type="application/x-ndjson")


def post(server: HubServer, path: str, *, content: str, type: str = "application/json") -> httpx2.Response:
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": type}
    return httpx2.post(path if path.startswith("http") else server.url + path, content=content, headers=headers)


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../../b", "a//b", "a/", ".git/config", "a/.git/b", ".", ""])
@pytest.mark.parametrize("key", ["file", "lfsFile", "deletedFile"])
def test_paths_that_are_refused(server, api, path, key):
    response = commit(server, (key, {"path": path, "content": "", "encoding": "base64", "oid": "0" * 64}))
    assert response.status_code == 400 and "Invalid path" in response.json()["error"]
    assert len(server.history(REPO)) == 1


def test_commits_that_are_refused(server, api):
    text = ("file", {"path": "a.txt", "content": "YQ==", "encoding": "base64"})
    long = "QUFB" * 400
    for response, message in (
        (commit(server, text, summary=""), "summary"),
        (commit(server, text, ("lfsFile", {"path": "b", "oid": "0" * 64})), "LFS pointer"),
        (commit(server, text, ("file", {"path": "b", "content": "?"})), "base64"),
        (commit(server, text, ("file", {"path": "b", "content": long})), "too large"),
        (commit(server, text, ("other", {"path": "b"})), "Unknown operation"),
        (commit(server, ("file", {"path": "README.md", "content": "LS0tCnRhZ3M6IDEKLS0tCg=="})), "tags"),
        (post(server, f"/api/models/{REPO}/commit/main", content="{}"), "one JSON object per line"),
    ):
        assert response.status_code == 400 and message in response.json()["error"]
    # Half of a commit is no commit
    assert len(server.history(REPO)) == 1
    assert commit(server, text).status_code == 200 and server.files(REPO)["a.txt"] == b"a"


def test_commits_on_an_old_head_are_refused(server, pushed):
    old = server.history(REPO)[1].id
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("log.csv")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        pushed.create_commit(REPO, operations, commit_message="late", parent_commit=old)
    assert error.value.response.status_code == 412
    new = [CommitOperationAdd("a.txt", b"a"), CommitOperationDelete("log.csv")]
    pushed.create_commit(REPO, new, commit_message="late", parent_commit=server.history(REPO)[0].id)
    assert server.files(REPO)["a.txt"] == b"a" and "log.csv" not in server.files(REPO)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\ntags: [a\n---\n", "YAML Metadata Error"),
        ("---\n- a\n---\n", "must be an object"),
        ("---\ntags: a\n---\n", "tags"),
        ("---\nmodel-index: [{name: a}]\n---\n", r"model-index\[0\].results"),
        ("---\nmodel-index: [{name: a, results: [{task: {type: b}, metrics: []}]}]\n---\n", "dataset"),
    ],
)
def test_cards_that_are_refused(server, api, card, message):
    with pytest.raises(ValueError, match=message):
        api.upload_file(repo_id=REPO, path_or_fileobj=card.encode(), path_in_repo="README.md")
    assert len(server.history(REPO)) == 1


def test_cards_without_metadata_are_warned_of(server, api):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"# Text", path_in_repo="README.md")


@pytest.mark.parametrize("size", [10, 5000])
def test_uploads_that_differ_from_what_was_announced(server, api, size):
    base, oid = f"/{REPO}.git/info/lfs/objects", hashlib.sha256(b"x" * size).hexdigest()
    announced = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": size}]}
    [entry] = post(server, f"{base}/batch", content=json.dumps(announced)).json()["objects"]
    href = entry["actions"]["upload"]["href"]
    verify = entry["actions"]["verify"]["href"]
    content = json.dumps({"oid": oid, "size": size})
    assert post(server, verify, content=content).status_code == 422
    assert httpx2.put(href, content=b"x" * (size - 1)).status_code == 400
    assert httpx2.put(href, content=iter([b"x" * size])).status_code == 501
    assert httpx2.put(href.split("?")[0], content=b"x" * size).status_code == 403
    assert httpx2.put(href, content=b"x" * size, headers={"Authorization": "Bearer hf_"}).status_code == 400
    assert httpx2.put(href, content=b"y" * size).status_code == 200
    assert post(server, verify, content=content).status_code == 422
    assert commit(server, ("lfsFile", {"path": "a", "oid": oid})).status_code == 400
    assert httpx2.put(href, content=b"x" * size).status_code == 200
    assert post(server, verify, content=content).status_code == 200
    assert commit(server, ("lfsFile", {"path": "a", "oid": oid})).status_code == 200
    assert server.files(REPO)["a"] == b"x" * size


@pytest.mark.parametrize("head", ["Content-Length: 9\r\n\r\n{}", "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"])
def test_requests_that_end_too_soon_are_forgotten(server, head):
    with socket.create_connection(urlsplit(server.url).netloc.split(":")) as connection:
        connection.sendall(f"POST /api/validate-yaml HTTP/1.1\r\n{head}".encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert methods(server, "validate-yaml") == [("POST", 0)]


def test_ranges(server, pushed):
    content = FILES["log.csv"]
    url = f"{server.url}/{REPO}/resolve/main/log.csv"
    for given, expected in (("0-3", content[:4]), ("5-", content[5:]), ("-4", content[-4:]), ("1190-9999", content[1190:])):
        response = httpx2.get(url, headers={"Range": f"bytes={given}"}, follow_redirects=True)
        assert (response.status_code, response.content) == (206, expected)
        assert response.headers["Accept-Ranges"] == "bytes"
    response = httpx2.get(url, headers={"Range": "bytes=1200-"}, follow_redirects=True)
    assert response.status_code == 416 and response.headers["Content-Range"] == "bytes */1200"


def test_what_the_server_does_not_know_is_remembered():
    with HubServer() as server:
        assert httpx2.get(f"{server.url}/api/spaces/a/b").status_code == 404
        assert httpx2.request("DELETE", f"{server.url}/api/repos/delete").status_code == 404
        HfApi(endpoint=server.url, token=server.token).create_repo(REPO)
        assert post(server, f"/api/models/{REPO}/preupload/main", content="{}").status_code == 500
        url = server.url
    assert server.unexpected[:2] == ["hub: GET /api/spaces/a/b", "hub: DELETE /api/repos/delete"]
    assert len(server.unexpected) == 3 and "KeyError: 'files'" in server.unexpected[2]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)
