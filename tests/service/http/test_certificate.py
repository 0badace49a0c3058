"""A certificate's dates are read, logged and renewed before clients refuse it."""

from __future__ import annotations

import datetime
import os
import ssl
from datetime import UTC, timedelta
from pathlib import Path

import pytest
import trustme

from command import Unavailable
from service.artifact import Artifact
from service.http import certificate as certificate_module
from service.http.certificate import Certificate, validity_of
from tests.service.test_server import running

NOW = datetime.datetime.now(UTC).replace(microsecond=0)


def write(
    folder: Path, begins: timedelta, ends: timedelta, authority: trustme.CA | None = None
) -> tuple[Path, Path]:
    """Write a certificate and its key, valid between two offsets from now; return their paths."""
    leaf = (authority or trustme.CA()).issue_cert(
        "127.0.0.1", not_before=NOW + begins, not_after=NOW + ends
    )
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(part.bytes() for part in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return chain, key


def test_a_chain_is_valid_while_all_of_its_certificates_are(
    tmp_path: Path,
) -> None:
    chain, _ = write(tmp_path, timedelta(days=-3), timedelta(days=30))
    assert validity_of(chain.read_bytes()) == (NOW - timedelta(days=3), NOW + timedelta(days=30))
    first = chain.read_bytes()
    write(tmp_path, timedelta(days=-1), timedelta(days=10))
    assert validity_of(b"# leaf\n" + first + chain.read_bytes()) == (
        NOW - timedelta(days=1),
        NOW + timedelta(days=10),
    )
    chain, _ = write(
        tmp_path, timedelta(days=-365 * 60), timedelta(days=365 * 80)
    )  # both forms of a time
    begins, ends = validity_of(chain.read_bytes()) or (NOW, NOW)
    assert (begins.year, ends.year) == (
        (NOW - timedelta(days=365 * 60)).year,
        (NOW + timedelta(days=365 * 80)).year,
    )


def test_the_dates_equal_those_that_ssl_reads(tmp_path: Path) -> None:
    authority = trustme.CA().cert_pem
    authority.write_to_path(tmp_path / "authority.pem")
    context = ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))
    [known] = context.get_ca_certs()
    begins, ends = validity_of(authority.bytes()) or (NOW, NOW)
    assert (begins.timestamp(), ends.timestamp()) == (
        ssl.cert_time_to_seconds(str(known["notBefore"])),
        ssl.cert_time_to_seconds(str(known["notAfter"])),
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no certificate",
        b"-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\n====\n-----END CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\nMIL/////////\n-----END CERTIFICATE-----",
    ],
)
def test_dates_that_cannot_be_read_are_unknown(content: bytes) -> None:
    assert validity_of(content) is None


@pytest.mark.parametrize(
    ("begins", "ends", "event"),
    [
        (timedelta(days=-3), timedelta(days=-1), "the certificate has expired"),
        (timedelta(days=1), timedelta(days=100), "the certificate is not valid yet"),
        (timedelta(days=-3), timedelta(days=13), "the certificate expires soon"),
        (timedelta(days=-3), timedelta(days=15), None),
    ],
)
def test_an_expiring_certificate_is_logged_at_start_and_once_a_day(
    tmp_path: Path,
    begins: timedelta,
    ends: timedelta,
    event: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate = Certificate(*write(tmp_path, begins, ends))
    certificate.reload_if_changed()
    assert [record.message for record in caplog.records] == ([event] if event else [])
    monkeypatch.setattr(certificate_module, "WARN_EVERY_S", 0.0)
    certificate.reload_if_changed()
    assert [record.message for record in caplog.records] == ([event, event] if event else [])


def test_a_renewal_with_an_expired_certificate_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate(*write(tmp_path, timedelta(days=-3), timedelta(days=300)))
    write(tmp_path, timedelta(days=-3), timedelta(days=-2))
    assert certificate.reload_if_changed() is not None
    assert [record.message for record in caplog.records] == ["the certificate has expired"]


def test_a_file_without_an_end_is_not_read_as_a_certificate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain, key = write(tmp_path, timedelta(days=-3), timedelta(days=300))
    certificate = Certificate(chain, key)
    for endless in (True, False):
        chain.unlink()
        if endless:
            chain.symlink_to("/dev/zero")
        else:
            os.mkfifo(chain)
        assert certificate.reload_if_changed() is None
        with pytest.raises(Unavailable, match="it is no regular file"):
            Certificate(chain, key)
    assert [record.message for record in caplog.records] == [
        "the new certificate cannot be used; the previous one stays in use"
    ]


def test_a_service_that_starts_with_an_expired_certificate_logs_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    chain, key = write(tmp_path, timedelta(days=-3), timedelta(days=-1))
    variables = {"DRBERT_TLS_CERTIFICATE": str(chain), "DRBERT_TLS_KEY": str(key)}
    with running(f"reviews={artifact.directory}", scheme="https", **variables) as (_, process):
        process.terminate()
        assert "the certificate has expired" in process.communicate(timeout=30)[0]
