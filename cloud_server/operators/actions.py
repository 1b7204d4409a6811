"""What an operator may do, the same for commands and for the interface.

Law of the file: each function does one thing whole or raises, and says in its error what to do instead.
"""

from __future__ import annotations

from cloud_server.db import erasure as table
from cloud_server.db.audit import append_audit
from cloud_server.db.devices import REVOKED, load_device
from cloud_server.db.erasure import has_open_orders
from cloud_server.db.releases import load_release
from cloud_server.db.rounds import load_run, set_run_status
from cloud_server.deployment import Deployment
from wire.errors import ConfigurationError


def set_run(deployment: Deployment, run: str, status: str) -> str:
    """Pauses a run (`paused`) or lets it go on (`active`); a running service sees it within seconds.

    Args:
        run: empty for the one of the settings.

    Returns:
        The run's name.

    Raises:
        ConfigurationError: (operator) there is no such run, or it is finished.
    """
    name = run or deployment.settings.run.name
    with deployment.database.transaction() as connection:
        row = load_run(connection, name)
        if row is None:
            raise ConfigurationError(
                f"there is no run {name}", hint="it begins with the first `shoal-cloud run`"
            )
        if row.status == "finished":
            raise ConfigurationError(
                f"run {name} is finished", hint="give run.name of the settings another name"
            )
        set_run_status(connection, name, status)
    return name


def promote(deployment: Deployment, version: int, ring: str) -> None:
    """Points a ring at a release, held back or not.

    Raises:
        ConfigurationError: (operator) there is no such release, or the ring runs a newer one.
    """
    require_release(deployment, version)
    current = deployment.publisher.current_version(ring)
    if version < current:
        raise ConfigurationError(
            f"ring {ring} runs release {current}, which is newer than {version}",
            hint=f"shoal-cloud release rollback {version} --ring {ring}",
        )
    deployment.publisher.publish(version, ring)


def rollback(deployment: Deployment, ring: str, version: int, reason: str) -> int:
    """Takes a ring back to an older release; returns which.

    Args:
        version: 0 for what the ring ran before.

    Raises:
        ConfigurationError: (operator) there is no such release, or nothing to go back to.
    """
    if version:
        require_release(deployment, version)
    return deployment.publisher.rollback(ring, version=version, reason=reason).release_version


def erase_device(deployment: Deployment, device: str) -> str:
    """Revokes a device for good and makes it nameless: nothing that is kept leads from its name to what it did.

    Its name is in older backups and in logs, which end by themselves. The audit chain stays whole: it only ever had the
    pseudonym.

    Returns:
        What its rows are called now.

    Raises:
        ConfigurationError: (operator) there is no such device, or a round waits for it.
    """
    row = deployment.registry.show(device)
    if row.status != REVOKED:
        deployment.registry.revoke(device)
    now = deployment.clock.now()
    with deployment.database.transaction() as connection:
        if has_open_orders(connection, device, now):
            raise ConfigurationError(
                f"a round waits for {device}, which is revoked now", hint="erase it when the round has ended"
            )
        fresh = load_device(connection, device) or row
        append_audit(connection, "device.erased", now, {"device": row.pseudonym})
        return table.erase_device(connection, fresh)


def require_release(deployment: Deployment, version: int) -> None:
    """Looks whether there is a release.

    Raises:
        ConfigurationError: (operator) there is none.
    """
    with deployment.database.read() as connection:
        found = load_release(connection, version)
    if found is None:
        raise ConfigurationError(
            f"there is no release {version}", hint="`shoal-cloud release list` shows them all"
        )
