"""Sealed sets: tokens lie on the disk as AES-256-GCM ciphertext, block by block, of the same length and at the same place.

A block is 256 KiB of tokens. Its nonce is made from the key, its number, the mark of the block before it and its content by
HMAC-SHA256 (the idea of SIV, RFC 5297), so that the same input gives the same bytes and no nonce serves two contents; nonce and
tag, its mark, 28 bytes, stand in the footer. The tag too is over number and mark before: a block of another shard does not fit.
The checksums of the footer are those of the ciphertext: copies are verified without the key. On first touch a block is opened
whole and its tag checked; after that, a range of it is decrypted alone (GCM is counter mode).

Not sealed: lengths, sources, languages and ids of documents, sums, and the tokenizer.

A key is 64 hexadecimal digits or 32 bytes, in a file that its owner alone may read, or printed by a command
(`command:PROGRAM ARGS`), such as a key service's client. It is never taken from the environment, written down, or told.
"""

import base64
import hmac
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.errors import DataError

KEY_BYTES, MARK_BYTES = 32, 28
COMMAND = "command:"
_COMMAND_TIMEOUT_S = 60.0
_KEY = re.compile(r"[0-9A-Fa-f]{64}|[A-Za-z0-9+/]{43}=")


class Seal:
    """A key at work. Threads may share it; processes that are forked too."""

    def __init__(self, key: bytes) -> None:
        """Raises DataError where the package cryptography is missing."""
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as exc:
            raise DataError("sealed data needs the package cryptography, which is not installed here. "
                            "Try: pip install 'officina[sealed]'") from exc
        self._cipher_key, self._nonce_key = (hmac.digest(key, b"officina seal 1 " + use, "sha256")
                                             for use in (b"cipher", b"nonce"))
        self._gcm, self._modules = AESGCM(self._cipher_key), (Cipher, algorithms, modes)
        self.key_id = hmac.digest(key, b"officina seal 1 id", "sha256")[:8].hex()
        """Names the key without telling it."""

    def __repr__(self) -> str:
        return f"Seal({self.key_id})"

    def close(self, block: int, content: bytes, before: bytes) -> tuple[bytes, bytes]:
        """Ciphertext of a block's content, as long as it is, and the block's mark: nonce and tag.

        before: mark of the block before; empty for the first.
        """
        place = block.to_bytes(8, "little") + before
        nonce = hmac.digest(self._nonce_key, place + content, "sha256")[:12]
        sealed = self._gcm.encrypt(nonce, content, place)
        return sealed[:-16], nonce + sealed[-16:]

    def open(self, block: int, sealed: bytes, mark: bytes, before: bytes) -> bytes:
        """Content of a whole block. Raises ValueError if it is not what `close` sealed under this key in this place."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._gcm.decrypt(mark[:12], bytes(sealed) + mark[12:], block.to_bytes(8, "little") + before)
        except InvalidTag:
            raise ValueError("the tag does not match") from None

    def range(self, mark: bytes, offset: int, sealed: Any, out: Any) -> None:
        """Content of a part of a block whose tag was checked before, into `out`; `sealed` stands at byte `offset` of it."""
        Cipher, algorithms, modes = self._modules
        skip = offset % 16
        counter = mark[:12] + (2 + offset // 16).to_bytes(4, "big")  # GCM: 1 is for the tag, the data begins at 2
        decryptor = Cipher(algorithms.AES(self._cipher_key), modes.CTR(counter)).decryptor()
        if skip:
            decryptor.update(bytes(skip))
        decryptor.update_into(sealed, out)


class SealedArray:
    """Tokens of a sealed shard like a (n,) array; what is asked for is decrypted, and kept nowhere."""

    def __init__(self, sealed: Any, marks: np.ndarray, seal: Seal | None, dtype: np.dtype, block_bytes: int,
                 path: Path) -> None:
        """sealed: (bytes,) uint8, mapped or read; marks: (blocks, 28) uint8. Without a seal, tokens cannot be had."""
        self._sealed, self._marks, self._seal, self.dtype = sealed, marks, seal, np.dtype(dtype)
        self._block_bytes, self._path = block_bytes, path

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._sealed) // self.itemsize

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        if isinstance(wanted, np.ndarray):  # places: runs of neighbours are decrypted together
            runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if len(wanted) else []
            return np.concatenate([self[int(run[0]):int(run[-1]) + 1] for run in runs] or [np.empty(0, self.dtype)])
        start, stop, _ = wanted.indices(len(self))
        if self._seal is None:
            raise DataError(no_key(self._path))
        out = np.empty(max(stop - start, 0), self.dtype)
        left, at = memoryview(out).cast("B"), start * self.itemsize
        while len(left):
            block, offset = divmod(at, self._block_bytes)
            part = self._sealed[at:min(at + len(left), (block + 1) * self._block_bytes)]
            self._seal.range(self._marks[block].tobytes(), offset, memoryview(part), left[:len(part)])
            left, at = left[len(part):], at + len(part)
        return out


def no_key(path: Path) -> str:
    """What is said where the key is missing."""
    return (f"{path}: is sealed, and no key is given. For a run: data.sources.NAME.key=FILE (or 'command:PROGRAM ARGS'); for "
            "officina data inspect and verify: --key FILE.")


KEY_GIVEN = "is a key itself, which would be kept where everybody can read it: in configuration, logs and the shell's history"


def is_key(word: str) -> bool:
    """Is it a key itself, where the file or command that gives one belongs?"""
    return bool(_KEY.fullmatch(word.strip()))


def read_seal(word: str, wanted_id: str = "", what: str = "--key", run: Callable[..., Any] = subprocess.run) -> Seal:
    """The seal of a key file's path or of `command:PROGRAM ARGS`. wanted_id: the data set's, to tell a wrong key at once.

    Raises DataError, which never holds anything of the key.
    """
    if is_key(word):
        raise DataError(f"{what}: {KEY_GIVEN}. Try: {what} FILE, with the key in the file")
    by_command = word.startswith(COMMAND)
    content = (_from_command(word.removeprefix(COMMAND), what, run) if by_command
               else _from_file(Path(word).expanduser(), what))
    key = _decoded(content)
    if key is None:
        raise DataError(f"{what}: what {word} gives is no key ({len(content)} bytes): 64 hexadecimal digits, or 32 bytes as "
                        "they are or in base64. Make one: (umask 077; openssl rand -hex 32 >my.key)")
    seal = Seal(key)
    if wanted_id and seal.key_id != wanted_id:
        raise DataError(f"{what}: {word} gives the key {seal.key_id}, but the data set is sealed with {wanted_id}. "
                        "Name the other key.")
    return seal


def _from_file(path: Path, what: str) -> bytes:
    try:
        about = os.stat(path)
        content = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{what}={path}: the key cannot be read ({exc.strerror}). Name a file with 64 hexadecimal digits, or "
                        "'command:PROGRAM ARGS' that prints them.") from exc
    if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(about.st_mode)
        raise DataError(f"{what}={path}: others may read the key (mode {mode:04o}). Try: chmod 600 {path}")
    return content


def _from_command(command: str, what: str, run: Callable[..., Any]) -> bytes:
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise DataError(f"{what}: {command}: {str(exc).lower()}. Write the command as in a shell: "
                        "'command:PROGRAM ARGS'") from None
    try:
        done = run(words, capture_output=True, timeout=_COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    except (OSError, IndexError, subprocess.TimeoutExpired) as exc:
        raise DataError(f"{what}: {command or 'the command'} gives no key ({type(exc).__name__}). Try it by hand.") from None
    if done.returncode:
        raise DataError(f"{what}: {command} ended with exit status {done.returncode}. Try it by hand.")
    return done.stdout


def _decoded(content: bytes) -> bytes | None:
    text = content.strip()
    if len(content) == KEY_BYTES:
        return content
    for decode in (bytes.fromhex, lambda said: base64.b64decode(said, validate=True)):
        try:
            key = decode(text.decode("ascii"))
        except ValueError:
            continue
        if len(key) == KEY_BYTES:
            return key
    return None
