"""Whether what a client or the server sees of examples fits them, known before anybody has rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from hetero_fl.config.clients import AugmentConfig, ClientSettings, PreprocessConfig, ScannerConfig
from hetero_fl.config.population import Kind
from hetero_fl.data.base import Dataset
from hetero_fl.data.layout import Layout
from hetero_fl.data.preprocess import Preprocess
from hetero_fl.errors import UserError

Shape = tuple[int, ...]


def check_settings(kinds: Iterable[Kind], dataset: Dataset) -> None:
    """Refuse (UserError) what clients' settings ask of examples that are no images, or are tokens."""
    for kind in kinds:
        seen_shape(kind.first, kind.settings, raw_shape(dataset), dataset.layout)
        if dataset.vocabulary is not None:
            _check_tokens(kind.first, kind.settings.preprocess)


def check_alike(
    found: Shape, where: str, name: str, clients: Mapping[str, ClientSettings], common: Dataset,
    server: PreprocessConfig | None = None,
) -> None:  # fmt: skip
    """Refuse (UserError) another set's examples that somebody would see in another shape than those of the common set.

    Args:
        found: their raw shape.
        where, name: the other set's, for the line that refuses it.
        clients: the settings of those who see both sets.
        server: how the server sees examples, if it has a model of its own.
    """
    shapes = found, raw_shape(common)
    seen = [
        (f"client '{c}'", "its preprocess", *(seen_shape(c, settings, shape, common.layout) for shape in shapes))
        for c, settings in clients.items()
    ]
    if server is not None:
        place = "server.preprocess"
        view = Preprocess.plain(server, common.layout, shapes[1], place)
        seen.append(("the server", place, *(view.shape(shape, place) for shape in shapes)))
    for who, section, theirs, ours in seen:
        if theirs != ours:
            raise UserError(
                f"{where}: examples of {name} have shape {theirs}, those of the common set {common.name} {ours}, "
                f"as {who} sees them; set {section}.resize or channels"
            )


def needed(settings: Iterable[ClientSettings], layout: Layout) -> set[str]:
    """The columns or blocks that may not be missing: those that one of these clients sees, unless it says what becomes of
    them then."""
    return {column for one in settings for column in _needed(one.preprocess, layout)}


def seen_shape(name: str, settings: ClientSettings, raw: Shape, layout: Layout) -> Shape:
    """Shape of an example as a client sees it; refuses what its settings ask of examples that are no images."""
    where = f"clients: '{name}': preprocess"
    seen = Preprocess.resolve(_fixed(settings.preprocess), None, where, layout, raw).shape(raw, where)
    image = len(seen) == 3
    for setting, value, plain, given in (
        ("scanner", settings.scanner, ScannerConfig(), raw),
        ("augment", settings.augment, AugmentConfig(), seen),
    ):
        if value != plain and len(given) != 3:
            raise UserError(
                f"clients: '{name}': {setting}: is for images, but the examples have shape {given}; leave it out"
            )
    if image and settings.augment.crop >= min(seen[1:]):
        raise UserError(
            f"clients: '{name}': augment.crop: found {settings.augment.crop}; images have {min(seen[1:])} pixels"
        )
    return seen


def raw_shape(dataset: Dataset) -> Shape:
    """Shape of an example as it lies in memory."""
    return tuple(dataset.train.x.shape[1:])


def _needed(config: PreprocessConfig, layout: Layout) -> Collection[str]:
    if config.missing is not None:
        return ()
    return layout.names if config.columns is None else config.columns


def _check_tokens(name: str, view: PreprocessConfig) -> None:
    for name_of in ("normalize", "missing"):
        if getattr(view, name_of) is not None:
            where = f"clients: '{name}': preprocess.{name_of}"
            raise UserError(f"{where}: is for numbers, but the examples are tokens; leave it out")


def _fixed(config: PreprocessConfig) -> PreprocessConfig:
    """The same view as far as it is known before anybody has rows."""
    return config.model_copy(update={"normalize": None}) if config.normalize == "own" else config
