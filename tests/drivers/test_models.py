"""Model folders."""

from pathlib import Path

import pytest

from gpu_server.drivers.models import FolderModelStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for folder in ("small", "org/large", "org/.hidden", "empty"):
        (root / folder).mkdir(parents=True)
    (root / "small/config.json").touch()
    (root / "small/parts").mkdir()
    (root / "org/large/config.json").touch()
    return root


def test_models_are_found_by_name_or_by_organisation_and_name(root: Path) -> None:
    """Ids of one and of two parts lead to their folders, and a missing model is None."""
    store = FolderModelStore(root)
    assert store.find("small") == root / "small"
    assert store.find("org/large") == root / "org/large"
    assert store.find("org/none") is None
    assert store.find("small/config.json") is None


def test_names_lists_models_of_both_levels(root: Path) -> None:
    """A folder with files is a model, one with only folders an organisation; hidden ones are neither."""
    assert FolderModelStore(root).names() == ("org/large", "small")
    assert FolderModelStore(root / "none").names() == ()


@pytest.mark.parametrize(
    "model_id",
    [
        "",
        ".",
        "..",
        "../other",
        "org/..",
        "/etc",
        "org/large/x",
        "a//b",
        "-x",
        "a\n",
        "a b",
        "org/",
        "\0",
        "é",
    ],
)
def test_ids_that_could_leave_the_store_are_no_ids(root: Path, model_id: str) -> None:
    """Whatever is not one or two plain names is refused before the file system is asked."""
    with pytest.raises(ValueError, match="no model id"):
        FolderModelStore(root).find(model_id)


def test_links_are_followed_inside_the_store_only(root: Path, tmp_path: Path) -> None:
    """A link to another model is that model; a link out, to the root or in a circle is no model."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").touch()
    for name, target in (
        ("out", tmp_path / "secret"),
        ("up", tmp_path),
        ("self", root),
        ("alias", root / "small"),
        ("circle", root / "circle"),
    ):
        (root / name).symlink_to(target)
    (root / "org/out").symlink_to(tmp_path / "secret")
    store = FolderModelStore(root)
    assert store.find("alias") == root / "small"
    for name in ("out", "up", "self", "circle", "org/out", "out/x"):
        assert store.find(name) is None
    assert store.names() == ("alias", "org/large", "small")


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    """An operator may link the store to where the mount is."""
    (tmp_path / "link").symlink_to(root)
    assert FolderModelStore(tmp_path / "link").find("small") == root / "small"
