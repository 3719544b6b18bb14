"""Data sets in class folders: one list of classes for both splits, and the image files of each class.

Hidden names are skipped everywhere, links are followed, and what is left out is said.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path

from ..console import note, warn
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..user_files import reading, unreadable
from .formats import image_suffixes, suffix_of

# Folders that systems and archivers add beside or among the user's own; some hold copies of the images.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
# Files that often lie beside images; leaving them out is worth a note, not a warning.
EVERYDAY = frozenset({".txt", ".md", ".db", ".ini", ".json", ".xml", ".csv", ".tsv", ".md5", ".sha1", ".sha256"})

Identity = tuple[int, int]  # the device and the number of a folder; links to it have the same


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: `._a.JPEG`, `.DS_Store`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def some(names: Iterable[str], what: str) -> str:
    """How many names there are and the first ones, sorted: `5 classes (a, b, c, ...)`; `what` is in the singular."""
    every = sorted(names)
    plural = "" if len(every) == 1 else "es" if what.endswith("s") else "s"
    return f"{len(every)} {what}{plural} ({', '.join(every[:3])}{', ...' if len(every) > 3 else ''})"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one.

    Raises:
        UserError: a link to what is not there, unless its name is an image's: reading reports that one.
    """
    try:
        if entry.is_dir():
            return True
        if not entry.is_symlink() or suffix_of(entry.name) in image_suffixes():
            return False
        os.stat(entry.path)
    except OSError as error:
        if suffix_of(entry.name) in image_suffixes():
            return False
        target = f", a link to {os.readlink(entry.path)}" if entry.is_symlink() else ""
        raise unreadable(f"{entry.path}{target}", error, "repair it or remove it") from None
    return False


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, in the disk's order."""
    with reading(str(folder), "it must be a folder that this user can read"), os.scandir(folder) as entries:
        yield from entries


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in `folder`, and of links to folders, sorted; without hidden ones.

    Raises:
        UserError: `folder` or a link in it cannot be read.
    """
    return sorted(entry.name for entry in _entries(folder) if not is_hidden(entry.name) and _is_folder(entry))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return suffix_of(entry.name) in image_suffixes() and not is_hidden(entry.name) and not _is_folder(entry)


def class_folders(folder: Path, num_classes: int) -> list[str]:
    """Names of the folders in `folder`, sorted: their order is the order of the labels. Hidden folders do not count.

    Raises:
        UserError: there are not `num_classes` of them; with some missing, every label would shift.
    """
    return _counted(folder, folders_in(folder), num_classes)


def _counted(folder: Path, names: list[str], num_classes: int) -> list[str]:
    if not names and not num_classes:
        raise UserError(f"{folder} has no class folders, one for each class{_loose(folder)}")
    if num_classes and len(names) != num_classes:
        counted = f"{len(names)} class folders, expected {num_classes} (empty folders count too)"
        raise UserError(f"{folder} has {counted}{_unlike(names)}{_loose(folder)}")
    return names


def class_list(
    splits: Sequence[Path],
    num_classes: int,
    listed: tuple[Path, list[str]] | None = None,
    besides: Set[str] = frozenset(),
) -> list[str]:
    """The class list of a data set: the sorted names of the class folders, which are the same in all its `splits`.

    A split without any folder is not compared.

    Args:
        num_classes: 0: however many there are.
        listed: the file that lists the classes, and what it lists, sorted; else the first split tells them.
        besides: folders that are no classes.

    Raises:
        UserError: a split has other class folders, or there are not `num_classes`, or none.
    """
    names = {split: [n for n in folders_in(split) if n not in besides] for split in splits if os.path.isdir(split)}
    found = {split: own for split, own in names.items() if own}
    reference, classes = listed or next(iter((found or names or {splits[0]: []}).items()))
    for split, own in found.items():
        _check_classes(split, set(own), reference, set(classes))
    return classes if listed else _counted(reference, classes, num_classes)


def _check_classes(folder: Path, names: Set[str], reference: Path, classes: Set[str]) -> None:
    missing, extra = classes - names, names - classes
    parts = [f"it lacks {some(missing, 'class')}"] * bool(missing) + [f"{some(extra, 'folder')} too many"] * bool(extra)
    if parts:
        raise UserError(
            f"the class folders of {folder} are not the classes of {reference}: {', '.join(parts)}; labels follow the "
            "sorted names, so put missing folders there and move others away"
        )


def _unlike(names: Sequence[str]) -> str:
    """Which of `names` have other letters than most, whatever the digits: likely no classes."""
    shapes = {name: "".join("9" if c.isdigit() else c for c in name) for name in names}
    [(usual, count)] = Counter(shapes.values()).most_common(1) or [("", 0)]
    odd = [name for name in names if shapes[name] != usual]
    return f"; unlike the others: {some(odd, 'name')}" if odd and 2 * count > len(names) else ""


def _loose(folder: Path) -> str:
    """What lies in `folder` itself and not in a class folder, by ending."""
    if not os.path.isdir(folder):
        return ""
    kinds = Counter(_kind(e.name) for e in _entries(folder) if not is_hidden(e.name) and not _is_folder(e))
    return f"; outside of class folders lie {_counts(kinds)}: each belongs in the folder of its class" if kinds else ""


def _kind(name: str) -> str:
    return suffix_of(name) or "without an ending"


def _counts(kinds: Counter[str]) -> str:
    """`7 .heic, 3 .txt`, the frequent kinds first."""
    shown = [f"{count} {kind}" for kind, count in kinds.most_common(6)]
    return ", ".join(shown) + (", ..." if len(kinds) > 6 else "")


class LabelledFiles(list[tuple[str, int]]):
    """(path, label) of images.

    Attributes:
        class_names: the name of every class, by label.
        of_class: the number of images of each class that has any, by name.
    """

    def __init__(self, files: Iterable[tuple[str, int]], class_names: Sequence[str]) -> None:
        super().__init__(files)
        self.class_names = tuple(class_names)
        counted = Counter(label for _, label in self)
        self.of_class = Counter({self.class_names[label]: count for label, count in counted.items()})


def labelled_files(folder: Path, classes: Sequence[str]) -> LabelledFiles:
    """(path, label) of every image at any depth below `folder`/<class>, by class and then by path.

    Images are told by the ending of their names (`formats.image_suffixes`). Links to folders are followed, but not
    back to a folder that they lie in. Warns of classes without an image and of folders that are no class, and says
    how many files were passed over.

    Raises:
        UserError: a class has no folder, a folder or a link cannot be read, or there is no image.
    """
    walk = _Walk(folder)
    found = walk.labelled(classes)
    extra = set(walk.folders) - {name.split("/")[0] for name in classes}
    if extra and current_ranks().first:
        warn(f"{folder}: {some(extra, 'folder')} not in the list of classes left out")
    walk.report(found)
    return found


def files_of_split(
    home: Path, part: str, classes: Sequence[str], official: Mapping[str, int], annotated: LabelledFiles | None = None
) -> LabelledFiles:
    """The files of `home`/`part`, where `part` is "train" or "val", compared with the other split.

    Args:
        official: the number of images of each split of the whole data set.
        annotated: the files of `val`/images, where a list names them; else they are in class folders.

    Raises:
        UserError: see `labelled_files`; a class has images in one split only; or images of `val` are missing.
    """
    walk, train, val = _Walk(home / part), home / "train", home / "val"
    if part == "train":
        files = walk.labelled(classes)
        trained, tested = set(files.of_class), set(annotated.of_class) if annotated else _with_images(val, classes)
    else:
        files = annotated or walk.labelled(classes)
        trained, tested = _with_images(train, classes), set(files.of_class)
        if annotated:
            _check_annotated(annotated, set(walk.images("images")), val)
        else:
            _check_val(files, val, walk.loose, official["val"])
    _check_coverage(train, trained, val, tested)
    if not annotated:  # a list of some images of some classes is a choice
        _check_coverage(val, tested, train, trained)
    walk.report(files)
    if len(files) != official[part] and current_ranks().first:
        warn(f"{walk.folder} has {len(files)} images, where the published data set has {official[part]}")
    return files


def files_of_folder(folder: Path, classes: Sequence[str], other: Path | None = None) -> LabelledFiles:
    """The files of `folder`/<class>, which is a split of which nothing is known before.

    Args:
        other: the other split, if there is one.

    Raises:
        UserError: see `labelled_files`; or a class has images in one of the two splits only.
    """
    files = labelled_files(folder, classes)
    if other is not None:
        here, there = set(files.of_class), _with_images(other, classes)
        _check_coverage(folder, here, other, there)
        _check_coverage(other, there, folder, here)
    return files


def files_below(folder: Path) -> list[str]:
    """The paths of the images at any depth below `folder`; a folder's own come before those of its folders.

    Raises:
        UserError: a folder or a link cannot be read, or there is no image.
    """
    walk = _Walk(folder)
    above = _with_parents(os.path.dirname(os.path.realpath(folder)))
    found = LabelledFiles(((path, 0) for path in walk.images_below(str(folder), above)), [str(folder)])
    if not found:
        others = f"; {_counts(walk.passed)} are not read as images" if walk.passed else ""
        raise UserError(f"no image in {folder}{others}")
    walk.report(found)
    return [path for path, _ in found]


class _Walk:
    """A walk through class folders.

    Attributes:
        passed: number of files that are no images, by ending.
        hidden: number of hidden files and folders.
        loops: links back to a folder that they lie in.
        loose, folders: the images and the folders in the split's folder itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.passed: Counter[str] = Counter()
        self.hidden = 0
        self.loops: list[str] = []
        self.loose: list[str] = []
        self.folders: list[str] = []

    def labelled(self, classes: Sequence[str]) -> LabelledFiles:
        """(path, label) of the images of all classes; see `labelled_files`."""
        self.loose, self.folders = self._sorted_entries(str(self.folder))
        here = set(self.folders)
        missing = [name for name in classes if name not in here and not os.path.isdir(self.folder / name)]
        if here and missing:
            raise UserError(f"{self.folder} lacks the folders of {some(missing, 'class')}; put them there")
        present = [] if missing else list(enumerate(classes))
        found = LabelledFiles(((path, label) for label, name in present for path in self.images(name)), classes)
        if not found:
            others = self.passed + Counter(map(_kind, self.loose))
            instead = f"; {_counts(others)} lie elsewhere, or are not read as images" if others else ""
            raise UserError(f"no image in the class folders of {self.folder}{instead}")
        return found

    def report(self, found: LabelledFiles) -> None:
        """Warn of what may be missing from the images `found`, and say what was passed over; once for all ranks."""
        if not current_ranks().first:
            return
        empty = set(found.class_names) - found.of_class.keys()
        if empty:
            warn(f"{self.folder} has no image of {some(empty, 'class')}")
        if self.loose:
            warn(f"{self.folder}: {some(self.loose, 'image')} in no class folder left out")
        if self.loops:
            warn(f"not followed, because it leads back to a folder that it lies in: {some(self.loops, 'link')}")
        passed = ([_counts(self.passed)] if self.passed else []) + [f"{self.hidden} hidden"] * bool(self.hidden)
        if passed:
            say = note if self.passed.keys() <= EVERYDAY else warn
            say(f"{self.folder}: passed over what is not read as an image: {', '.join(passed)}")

    def images(self, name: str) -> Iterator[str]:
        """The paths of the images at any depth below the class folder `name`: a folder's files, then its folders."""
        top = os.path.join(self.folder, name)
        return self.images_below(top, self._folders_above(top))

    def images_below(self, top: str, lies_in: frozenset[Identity]) -> Iterator[str]:
        """Likewise below the folder `top`, which lies in the folders `lies_in`."""
        pending = [(top, lies_in)]
        while pending:
            where, above = pending.pop()
            here = _identity(where)
            if here in above and here[1]:  # some file systems give every folder the number 0
                self.loops.append(where)
                continue
            images, folders = self._sorted_entries(where)
            yield from (os.path.join(where, name) for name in images)
            pending += [(os.path.join(where, name), above | {here}) for name in reversed(folders)]

    def _sorted_entries(self, where: str) -> tuple[list[str], list[str]]:
        """The images and the folders in a folder; everything else is counted.

        ImageNet has 1.28 million files: an ordinary image costs no stat and no call of a Python function.
        """
        suffixes = image_suffixes()
        images, folders = [], []
        for entry in _entries(where):
            name = entry.name
            if name[0] == "." or name in SYSTEM_FOLDERS:
                self.hidden += 1
            elif name[name.rfind(".") :].lower() in suffixes and entry.is_file(follow_symlinks=False):
                images.append(name)
            elif _is_folder(entry):
                folders.append(name)
            elif suffix_of(name) in suffixes:
                images.append(name)  # a link to a file, or to nothing
            else:
                self.passed[_kind(name)] += 1
        return sorted(images), sorted(folders)

    @cached_property
    def _above(self) -> frozenset[Identity]:
        """The split's folder and those that it lies in."""
        return _with_parents(os.path.realpath(self.folder))

    def _folders_above(self, top: str) -> frozenset[Identity]:
        """The folders that a class folder lies in: by its path, and where it is a link, also by what it leads to."""
        linked = os.path.islink(top)
        return self._above | _with_parents(os.path.dirname(os.path.realpath(top))) if linked else self._above


def _with_parents(folder: str) -> frozenset[Identity]:
    return frozenset(_identity(path) for path in (folder, *map(str, Path(folder).parents)))


def _identity(folder: str) -> Identity:
    with reading(folder, "it must be a folder that this user can read"):
        found = os.stat(folder)
    return found.st_dev, found.st_ino


def _with_images(folder: Path, classes: Iterable[str]) -> set[str]:
    """The classes of which there is an image in `folder`, which may be missing; reads no further than that."""
    walk = _Walk(folder)
    return {name for name in classes if os.path.isdir(folder / name) and _has_image(folder / name, walk.images(name))}


def _has_image(class_folder: Path, images: Iterator[str]) -> bool:
    return any(map(_is_image, _entries(class_folder))) or any(images)


def _check_coverage(folder: Path, has: Set[str], other: Path, others: Set[str]) -> None:
    """Refuse a split in `folder` that lacks images of classes of which the split in `other` has some."""
    lacking = others - has
    if has and lacking:
        raise UserError(
            f"{folder} has no image of {some(lacking, 'class')} of which {other} has some; put the images there"
        )


def _check_annotated(files: LabelledFiles, there: Set[str], val: Path) -> None:
    """Refuse annotations of `val` that are not those of the images that are `there`, or that name one twice."""
    listed = Counter(path for path, _ in files)
    twice = [os.path.basename(path) for path, count in listed.items() if count > 1]
    gone = [os.path.basename(path) for path in listed.keys() - there if not os.path.exists(path)]
    unlisted = [os.path.basename(path) for path in there - listed.keys()]
    faults = {"not on the disk": gone, "on the disk but not listed": unlisted, "listed twice": twice}
    wrong = [f"{some(names, 'image')} {fault}" for fault, names in faults.items() if names]
    if wrong:
        raise UserError(f"{val}/val_annotations.txt does not fit {val}/images: {', '.join(wrong)}; unpack both again")


def _check_val(files: LabelledFiles, val: Path, loose: Sequence[str], official: int) -> None:
    """Refuse class folders of `val` with a part of its images, as after a copy that was stopped.

    That is: images lie beside the class folders or in `val`/images, and not also in a class folder; or some classes
    have all their images (equally many each) and others have not. A split that is smaller in all classes is a choice.
    """
    unsorted = _Walk(val).images("images") if os.path.isdir(val / "images") else []
    left = {*loose, *map(os.path.basename, unsorted)} - {os.path.basename(path) for path, _ in files}
    if left:
        raise UserError(f"in no class folder of {val}: {some(left, 'image')}; move each to the folder of its class")
    whole = official / len(files.class_names)
    short = [f"{name}: {files.of_class[name]}" for name in files.class_names if files.of_class[name] < whole]
    if short and max(files.of_class.values()) == whole:
        raise UserError(f"{val} has fewer than {whole:.0f} images of {some(short, 'class')}; put the others there")
