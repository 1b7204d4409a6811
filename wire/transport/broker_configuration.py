"""The configuration files that the brokers are started with: text in, text out.

Laws: every limit is stated, none is left at a default that drops messages; a device writes only under its own
name and reads only what is for all or for it (docs/protocol.md, clause 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigurationError
from wire.topics import ID, PREFIX

_DEVICE_WRITES = ("st/%u", "tm/%u", "jn/%u", "up/+/%u/#", "nd/%u/+", "rs/%u", "es/%u", "ir/%u")
_DEVICE_READS = ("rd/#", "md/#", "bl/#", "ak/%u", "cm/%u", "ea/%u")


@dataclass(frozen=True, slots=True)
class BrokerTls:
    """Mutual TLS 1.3: who the broker is, and who may come in with which rights.

    A client is called by the common name of its certificate, as user and as client id.

    Attributes:
        ca_file: PEM of the authority that signs the clients' certificates.
        certificate_file: PEM of the broker's own certificate (chain).
        key_file: PEM of its key.
        tenant: of the fleet that the broker serves.
        fleet: of the fleet that the broker serves.
        aggregators: common names that may read and write everything of the fleet.
    """

    ca_file: Path
    certificate_file: Path
    key_file: Path
    tenant: str
    fleet: str
    aggregators: tuple[str, ...] = ("aggregator",)


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What the broker holds at most.

    Attributes:
        max_packet_bytes: the largest packet; clients read it from CONNACK where the broker says it.
        max_inflight: QoS 1 publications to one client without acknowledgement.
        queued_messages: kept for one client that is away or slow (mosquitto).
        queued_bytes: of those.
        max_connections: clients at a time (embedded; mosquitto takes as many as it has descriptors).
    """

    max_packet_bytes: int = 1_048_576
    max_inflight: int = 64
    queued_messages: int = 20_000
    queued_bytes: int = 64 * 1_048_576
    max_connections: int = 4_096


def mosquitto_configuration(
    folder: Path, host: str, port: int, limits: BrokerLimits, tls: BrokerTls | None, *, as_root: bool
) -> str:
    """`mosquitto.conf` for one listener.

    Args:
        folder: database and access file lie here.
        as_root: mosquitto gives up root for a user that cannot read our files, unless told to stay.
    """
    lines = [
        *(["user root"] if as_root else []),
        f"listener {port} {host}",
        f"max_packet_size {limits.max_packet_bytes}",
        f"max_inflight_messages {limits.max_inflight}",
        "max_inflight_bytes 0",
        f"max_queued_messages {limits.queued_messages}",
        f"max_queued_bytes {limits.queued_bytes}",
        "max_connections -1",
        "persistence true",
        f"persistence_location {folder.resolve()}/",
        "persistence_file mosquitto.db",
        "autosave_interval 30",
        "persistent_client_expiration 14d",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "connection_messages false",
    ]
    if tls is None:
        lines.append("allow_anonymous true")
    else:
        lines += [
            "allow_anonymous false",
            f"cafile {tls.ca_file.resolve()}",
            f"certfile {tls.certificate_file.resolve()}",
            f"keyfile {tls.key_file.resolve()}",
            "tls_version tlsv1.3",
            "require_certificate true",
            "use_identity_as_username true",
            "use_username_as_clientid true",  # else a valid certificate may take another device's session
            f"acl_file {(folder / 'access').resolve()}",
        ]
    return "\n".join(lines) + "\n"


def mosquitto_access(tls: BrokerTls) -> str:
    """The access file: aggregators own the fleet's topics, devices what stands under their own name.

    Raises:
        ConfigurationError: (operator) a name that cannot stand in a topic.
    """
    for name in (tls.tenant, tls.fleet, *tls.aggregators):
        if not ID.fullmatch(name):
            raise ConfigurationError(
                f"{name!r} cannot be a tenant, fleet or user", hint="use A-Z a-z 0-9 _ -"
            )
    base = f"{PREFIX}/{tls.tenant}/{tls.fleet}"
    lines = []
    for name in tls.aggregators:
        lines += [f"user {name}", f"topic readwrite {base}/#", ""]
    lines += [f"pattern write {base}/{topic}" for topic in _DEVICE_WRITES]
    lines += [f"pattern read {base}/{topic}" for topic in _DEVICE_READS]
    return "\n".join(lines) + "\n"


def embedded_configuration(host: str, port: int, limits: BrokerLimits) -> str:
    """rumqttd's TOML: one MQTT 5 listener. It keeps a log of `max_segment_size` × `max_segment_count` per
    filter.
    """
    return f"""id = 0

[router]
id = 0
max_connections = {limits.max_connections}
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 8

[v5.1]
name = "shoal"
listen = "{host}:{port}"
next_connection_delay_ms = 0

[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {limits.max_packet_bytes}
max_inflight_count = {limits.max_inflight}
dynamic_filters = true
"""
