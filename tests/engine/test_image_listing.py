"""Which files of a folder are images, in which order, and what is said about the rest."""

from __future__ import annotations

import os

from vit_engine.images import find_images


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_folders_are_searched_in_a_fixed_order(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "a.tiff", "c.txt", ".hidden.png", ".git/x.png", "d/e/f.webp", "Z.gif"):
        touch(tmp_path / name)
    found, errors = find_images([tmp_path])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "Z.gif",
        "a.tiff",
        "b/10.jpg",
        "b/2.PNG",
        "d/e/f.webp",
    ]
    assert errors == []


def test_named_files_keep_their_order_whatever_their_suffix(tmp_path):
    b, a = touch(tmp_path / "b.dat"), touch(tmp_path / ".a")
    assert find_images([b, str(a)]) == ([b, a], [])


def test_what_cannot_be_listed_is_reported_and_the_rest_goes_on(tmp_path):
    good = touch(tmp_path / "good.png")
    (tmp_path / "empty").mkdir()
    found, errors = find_images([tmp_path / "missing", tmp_path / "empty", good, "bad\0name"])
    assert found == [good]
    assert [e.reason.split(" (")[0] for e in errors[:2]] == [
        "No such file or directory",
        "no image files in this folder",
    ]
    assert "null" in errors[2].reason
    assert str(errors[0]) == f"{tmp_path / 'missing'}: No such file or directory"


def test_an_unreadable_folder_is_reported(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    touch(tmp_path / "locked" / "b.png")
    real = os.listdir

    def listdir(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    found, errors = find_images([tmp_path])
    assert [p.name for p in found] == ["a.png"]
    assert [str(e) for e in errors] == [f"{tmp_path / 'locked'}: Permission denied"]


def test_loops_of_links_end_and_linked_files_are_found_once(tmp_path):
    touch(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "dangling.png").symlink_to(tmp_path / "nowhere")
    found, errors = find_images([tmp_path / "images"])
    assert [p.name for p in found] == ["a.png", "dangling.png"]
    assert errors == []
