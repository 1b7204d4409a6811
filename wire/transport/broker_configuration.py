"""The configuration files that the brokers are started with: text in, text out.

The launcher's mosquitto and one that an operator runs himself are configured by the same function. Laws: every limit is
stated, none is left at a default that drops messages or has no bound; every option says why it stands there. Sources:
docs/protocol.md, clauses 2 and 10; mosquitto.conf(5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

Persistence = Literal["interval", "change", "off"]


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
        aggregators: common names that read and write for the cloud.
        revocation_file: PEM of the authority's revocation list; None trusts every certificate until it ends.
    """

    ca_file: Path
    certificate_file: Path
    key_file: Path
    tenant: str
    fleet: str
    aggregators: tuple[str, ...] = ("aggregator",)
    revocation_file: Path | None = None

    def resolved(self) -> BrokerTls:
        """The same with absolute paths: the broker may run in another folder than we."""
        return replace(
            self,
            ca_file=self.ca_file.resolve(),
            certificate_file=self.certificate_file.resolve(),
            key_file=self.key_file.resolve(),
            revocation_file=self.revocation_file and self.revocation_file.resolve(),
        )


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What the broker holds at most.

    Attributes:
        max_packet_bytes: the largest packet; clients read it from CONNACK where the broker says it. The protocol needs
            122,880 bytes and a topic (docs/protocol.md, clause 6.1).
        max_inflight: QoS 1 publications to one client without acknowledgement.
        queued_messages: kept for one client that is away or slow (mosquitto).
        queued_bytes: of those.
        memory_bytes: of the whole broker (mosquitto).
        max_connections: clients at a time (embedded; mosquitto takes as many as it has descriptors).
    """

    max_packet_bytes: int = 131_072
    max_inflight: int = 64
    queued_messages: int = 20_000
    queued_bytes: int = 64 * 1_048_576
    memory_bytes: int = 1_073_741_824
    max_connections: int = 4_096


@dataclass(frozen=True, slots=True)
class BrokerSite:
    """Where mosquitto runs, and how.

    Attributes:
        host: address to listen on.
        port: to listen on.
        data: folder of its database.
        access_file: who may read and write what (`broker_access.py`); only with TLS.
        user: whom it becomes when root starts it; empty for its own default, `mosquitto`.
        persistence: when sessions, queues and retained messages are written to the disk.
        is_talkative: whether it logs who comes and goes.
    """

    host: str
    port: int
    data: Path
    access_file: Path
    user: str = ""
    persistence: Persistence = "interval"
    is_talkative: bool = False


Part = tuple[str, tuple[str, ...]]
"""Why, and the options; empty options leave the part out."""


def mosquitto_configuration(site: BrokerSite, limits: BrokerLimits, tls: BrokerTls | None) -> str:
    """`mosquitto.conf` for one listener, of mosquitto 2. Paths in it are as given."""
    parts = (
        ("As whom it runs when root starts it.", (f"user {site.user}",) if site.user else ()),
        *_limits(limits),
        *_persistence(site),
        *_logs(site),
        *_listener(site),
        *(_open_door() if tls is None else _locked_door(site, tls)),
    )
    return "\n".join(_written(parts))


def _written(parts: Iterable[Part]) -> list[str]:
    lines = ["# Written by Shoal for mosquitto 2. A change here is lost when it is written again."]
    for why, options in parts:
        if options:
            lines += ["", *(f"# {line}" for line in why.splitlines()), *options]
    return [*lines, ""]


def _limits(limits: BrokerLimits) -> tuple[Part, ...]:
    return (
        (
            "The largest packet: a chunk of 122,880 bytes and its topic fit (docs/protocol.md, clause 6.1).\n"
            "Who sends a larger one is disconnected.",
            (f"max_packet_size {limits.max_packet_bytes}",),
        ),
        (
            "To one client without its acknowledgement. Bytes are bounded by the number and the packet's size.",
            (f"max_inflight_messages {limits.max_inflight}", "max_inflight_bytes 0"),
        ),
        (
            "Kept for one client that is away or slow. What comes on top is dropped without a word: outbox and\n"
            "receipts make that good, but it costs time. (The default, 1,000, drops in every round.)",
            (
                f"max_queued_messages {limits.queued_messages}",
                f"max_queued_bytes {limits.queued_bytes}",
                "queue_qos0_messages false",
            ),
        ),
        (
            "Of the whole broker. At the limit it drops and disconnects; without one, a device that floods it, or\n"
            "fills it with retained messages under its own name, takes the machine down.",
            (f"memory_limit {limits.memory_bytes}",),
        ),
        (
            "A client that says nothing for twice this is gone; a device asks for 30 s. Who asks for more, or for\n"
            "no limit, is told this.",
            ("max_keepalive 600",),
        ),
        (
            "A session is forgotten after this; devices ask for 7 days.",
            ("persistent_client_expiration 14d",),
        ),
    )


def _persistence(site: BrokerSite) -> tuple[Part, ...]:
    if site.persistence == "off":
        return (
            (
                "Nothing is written: a restart loses sessions, queues and retained messages. Devices subscribe anew\n"
                "and send again what has no receipt; the aggregator announces anew.",
                ("persistence false",),
            ),
        )
    saved = {
        "interval": (
            "Written every 30 s (default: 30 min) and at a clean end. A crash loses what came since, which\n"
            "devices and aggregator send again; a queue on the disk costs no time while messages pass.",
            ("autosave_interval 30",),
        ),
        "change": (
            "Written at every change: a crash loses nothing, and every message waits for the whole database to\n"
            "be written (54 ms with 50 MB queued). Receipts make this unnecessary.",
            ("autosave_interval 1", "autosave_on_changes true"),
        ),
    }[site.persistence]
    return (
        (
            "Sessions and queues survive a restart, so that devices need not gather everything anew.",
            ("persistence true", f"persistence_location {site.data}/", "persistence_file mosquitto.db"),
        ),
        saved,
    )


def _logs(site: BrokerSite) -> tuple[Part, ...]:
    return (
        (
            "Errors and what an operator acts on; never topics or payloads.",
            (
                "log_dest stderr",
                "log_type error",
                "log_type warning",
                "log_type notice",
                f"connection_messages {'true' if site.is_talkative else 'false'}",
            ),
        ),
    )


def _listener(site: BrokerSite) -> tuple[Part, ...]:
    return (
        (
            "The one door. The number of connections is left to the limit of open files (LimitNOFILE): a number\n"
            "here would count strangers who only open a connection, and so let them shut the fleet out.",
            (f"listener {site.port} {site.host}", "protocol mqtt", "max_connections -1"),
        ),
        ("Small messages leave at once.", ("set_tcp_nodelay true",)),
        ("QoS 2 is not used on this wire, and costs the broker state.", ("max_qos 1", "max_topic_alias 10")),
    )


def _open_door() -> tuple[Part, ...]:
    return (
        ("Without certificates everybody may do everything: this machine only.", ("allow_anonymous true",)),
    )


def _locked_door(site: BrokerSite, tls: BrokerTls) -> tuple[Part, ...]:
    return (
        (
            "Mutual TLS 1.3 and nothing less; the broker's own certificate is signed by the fleet's authority, too.",
            (
                "allow_anonymous false",
                f"cafile {tls.ca_file}",
                f"certfile {tls.certificate_file}",
                f"keyfile {tls.key_file}",
                "tls_version tlsv1.3",
                "require_certificate true",
            ),
        ),
        (
            "Certificates that were revoked. Read again at SIGHUP; connections that are open stay, which is why the\n"
            "aggregator takes a revoked device's session over. The file must be there, and its nextUpdate to come:\n"
            "past it, mosquitto lets nobody in.",
            (f"crlfile {tls.revocation_file}",) if tls.revocation_file is not None else (),
        ),
        (
            "The name in the certificate is user and client id, whatever the client says: else a valid certificate\n"
            "could take another device's session over.",
            ("use_identity_as_username true", "use_username_as_clientid true"),
        ),
        ("Who may read and write what.", (f"acl_file {site.access_file}",)),
    )


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
