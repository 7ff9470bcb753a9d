"""Which questions share an image, within a task and across tasks: the units that intervals are made for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import count

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from latefusion.eval.tasks.base import Task
from latefusion.models.fingerprint import IMAGE_COLUMNS, image_fingerprint


def with_clusters(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with the cluster of each question.

    Questions are in one cluster if they have a `scene` of one task in common, or an image of any task: the same
    contents, whatever it is called there. A cluster is named after its first question.
    """
    keys: dict[Hashable, int] = {}
    numbers = count()
    questions, links, names = [], [], []
    for task in tasks:
        for scene, images in zip(task.rows.with_format(None)["scene"], images_of_rows(task), strict=True):
            question = next(numbers)
            for key in [(task.name, str(scene)), *images]:
                questions.append(question)
                links.append(keys.setdefault(key, len(keys)))
            names.append(f"{task.name}/{scene}" if len(tasks) > 1 else str(scene))
    size = len(names)
    graph = coo_array(
        ([1] * len(links), (questions, [size + link for link in links])), shape=(size + len(keys),) * 2
    )
    _, labels = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    clusters = [
        first.setdefault(label, name) for label, name in zip(labels[:size].tolist(), names, strict=True)
    ]
    starts = iter(clusters)
    return [replace(task, clusters=[next(starts) for _ in range(len(task.rows))]) for task in tasks]


def images_of_rows(task: Task) -> Iterator[list[str]]:
    """Fingerprints of each row's images, which are read as they are stored; a file is read once."""
    columns = [name for name in IMAGE_COLUMNS if name in task.rows.column_names]
    if not columns:
        yield from ([] for _ in range(len(task.rows)))
        return
    table = task.rows.select_columns(columns).with_format("arrow")
    files: dict[str, str] = {}

    def read(image: object) -> str:
        path = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else None
        if path is None:
            return image_fingerprint(image)
        if path not in files:
            files[path] = image_fingerprint(image)
        return files[path]

    for start in range(0, len(table), 128):
        for row in table[start : start + 128].to_pylist():
            values = [row[name] for name in columns if row[name] is not None]
            images = [image for value in values for image in (value if isinstance(value, list) else [value])]
            yield [read(image) for image in images]
