"""What a process holds open: closed once and for all, and never in the wrong namespace."""

from __future__ import annotations

import os

import pytest

from kernel import link, netns, nft
from kernel.netns import opened
from kernel.session import Session
from tests.hosts import wait_until
from tests.kernel import spaces
from tests.kernel.spaces import Space

pytestmark = pytest.mark.kernel


def test_closing_gives_all_descriptors_back(home: Space, container: Space) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    session = Session()
    with opened(container.path) as where, session.visit(where) as inside:
        link.get(inside, "lo")
        assert nft.all_elements(session, "masq4") == []
    session.close()
    session.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_visit_that_fails_half_way_leaves_nothing(session: Session, container: Space) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    here = netns.own()
    with pytest.raises(KeyError), opened(container.path) as where, session.visit(where):
        raise KeyError("in the middle")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert netns.own() == here


def test_a_closed_visit_lets_the_namespace_go(session: Session) -> None:
    with spaces.fresh() as space, opened(space.path) as where, session.visit(where) as inside:
        link.add_veth(session, link.VethSpec("v0", "v1", where.fd))
        assert link.find(inside, "v1") is not None
    # Nothing holds it any more: the kernel takes it down, and with it this end of the pair.
    wait_until(lambda: link.find(session, "v0") is None, "the end of the namespace")


def test_home_is_where_it_was_opened_not_where_the_thread_is(session: Session, container: Space) -> None:
    link.add_bridge(session, "br0", "02:00:00:00:00:01")
    with spaces.inside(container):
        assert link.get(session, "br0").kind == "bridge"
        with Session() as theirs:
            assert link.find(theirs, "br0") is None
