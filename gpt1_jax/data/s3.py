"""S3 by s3fs, with folders that can be renamed: fsspec would copy the folders too, which are no objects there.

TFDS renames the folder of a dataset when all of it is written.
"""

from typing import Any

import s3fs


class S3FileSystem(s3fs.S3FileSystem):
    """As :class:`s3fs.S3FileSystem`; it takes its place in fsspec when gpt1_jax.data.storage is imported."""

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **options: Any) -> None:
        """Moves a file, or with ``recursive`` a folder: object by object, and what was moved is removed at the end."""
        source, target = str(self._strip_protocol(path1)), str(self._strip_protocol(path2))
        files = list(map(str, self.find(source, maxdepth=maxdepth) or ())) if recursive else [source]
        self.copy(files, [target + file.removeprefix(source) for file in files], on_error="raise")
        self.rm(files)
