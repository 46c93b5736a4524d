"""Whether an attachment still lives: its namespace does, and its interface is in it."""

import os

from kernel import link, liveness, netns
from kernel.errors import KernelError
from kernel.liveness import LiveNetns
from kernel.session import Session


class Observer:
    """Looks at attachments during one GC; all namespaces of the host are listed once, when first needed."""

    def __init__(self, host: Session) -> None:
        self._host = host
        self._living: tuple[LiveNetns, ...] | None = None

    def attached(self, path: str, inode: int, cookie: int, ifname: str) -> bool:
        """Whether the interface is in the namespace that the attachment was made in.

        A namespace whose path is gone may be held by something else. Nobody can look into it by path then, so it
        counts as attached as long as it lives: an address given away too early is worse than one given late.

        Args:
            path: where the runtime said the namespace is; "" where it is unknown.
            inode: of the namespace, 0 where it is unknown.
            cookie: of the namespace, 0 where it is unknown. Inodes are given out again, cookies are not.
            ifname: the interface inside.
        """
        if path:
            try:
                with netns.opened(path) as container:
                    if not inode or container.identity.inode == inode:
                        with self._host.visit(container) as inside:
                            if not cookie or not inside.cookie or inside.cookie == cookie:
                                return link.find(inside, ifname) is not None
            except KernelError:
                pass  # gone, or something else by now
        return self.lives(inode, cookie)

    def lives_at(self, path: str, inode: int, cookie: int) -> bool:
        """Whether a namespace lives; looks at the path first, which spares looking at the whole host. As `attached`."""
        if path:
            try:
                with netns.opened(path) as container:
                    if container.identity.inode == inode:
                        found = netns.cookie_at(container, self._host.home_fd)
                        if not cookie or not found or found == cookie:
                            return True
            except KernelError:
                pass  # gone, or something else by now
        return self.lives(inode, cookie)

    def lives(self, inode: int, cookie: int) -> bool:
        """Whether a namespace lives anywhere on this host. An unknown one does not."""
        if not inode and not cookie:
            return False
        if self._living is None:
            self._living = liveness.observe()
        if cookie:
            return any(cookie == one.cookie or (not one.cookie and inode == one.inode) for one in self._living)
        return any(inode == one.inode for one in self._living)


def boot_id() -> str:
    """What names this boot; the same for every container on the host."""
    fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode("ascii", "replace").strip()
    finally:
        os.close(fd)
