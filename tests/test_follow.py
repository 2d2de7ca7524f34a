"""What one reader of the log notices that its server did."""

from __future__ import annotations

from dataclasses import replace

import pytest
from carriers import TTL_S, claimed
from refleet.common import wire
from refleet.common.errors import StreamUnavailable
from refleet.common.memory_stream import MemoryServer, MemoryStream
from refleet.common.signing import SigningKey, Trust, seal
from refleet.worker.follow import Follower
from world import World, checkpoint


def away(*_args: object, **_options: object) -> None:
    raise StreamUnavailable("away")


def test_another_entry_at_the_place_of_the_last_one_is_read_after_an_outage(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores may number alike in a server that was emptied."""
    release = small_world.publisher(answer=False).publish(checkpoint(1), version="v1").release
    key = SigningKey.new()
    server = MemoryServer()
    stream, publisher = MemoryStream(server, small_world.model), MemoryStream(server, small_world.model)
    follower = Follower(small_world.model, trust=Trust({key.key_id: key._private.public_key()}), accepted=None)
    publisher.append(claimed(publisher, "a"), 1, seal(wire.pack(release), None), ttl_s=TTL_S)
    assert [refusal.code for refusal in follower.read(stream, block_s=0).refused] == ["BadSignature"]

    server.lose_everything()
    with monkeypatch.context() as outage:
        outage.setattr(stream, "read", away)
        with pytest.raises(StreamUnavailable):
            follower.read(stream, block_s=0)
    other = replace(release, publisher="b" * 32)
    publisher.append(claimed(publisher, "b"), 1, seal(wire.pack(other), key), ttl_s=TTL_S)
    assert other.order == release.order
    assert follower.read(stream, block_s=0).accepted == other
