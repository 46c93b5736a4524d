"""A client of the CRI, `runtime.v1`, in plain gRPC.

No package has its generated code. The descriptor is inside containerd's own program, as Go programs carry theirs: a
gzipped FileDescriptorProto named `api.proto`. Its one import has nothing but Go's options, which are dropped.
"""

from __future__ import annotations

import mmap
import re
import shutil
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool, json_format, message_factory

PACKAGE = "runtime.v1"
_CALL_S = 120.0


class CriError(Exception):
    """What the runtime answered; the text is its own."""


class Cri:
    """The RuntimeService at a unix socket; use as a context manager. Messages are dictionaries, with the fields' names
    as in the .proto file and enumerations by name."""

    def __init__(self, socket: Path) -> None:
        # Go's server refuses the escaped path that would be the authority.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost")]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options)

    def close(self) -> None:
        self._channel.close()

    def call(self, method: str, request: Mapping[str, Any] | None = None, service: str = "RuntimeService") -> Any:
        """The answer to one call. Raises CriError."""
        found = _pool().FindServiceByName(f"{PACKAGE}.{service}").methods_by_name[method]
        call = self._channel.unary_unary(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda given: given.SerializeToString(),
            response_deserializer=_class(found.output_type).FromString,
        )
        question = json_format.ParseDict(dict(request or {}), _class(found.input_type)())
        try:
            answer = call(question, timeout=_CALL_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise CriError(error.details()) from None
        return json_format.MessageToDict(answer, preserving_proto_field_name=True)

    def run_pod(self, config: Mapping[str, Any]) -> str:
        """RunPodSandbox; the pod's id."""
        return str(self.call("RunPodSandbox", {"config": dict(config)})["pod_sandbox_id"])

    def stop_pod(self, pod: str) -> None:
        self.call("StopPodSandbox", {"pod_sandbox_id": pod})

    def remove_pod(self, pod: str) -> None:
        self.call("RemovePodSandbox", {"pod_sandbox_id": pod})

    def pods(self) -> list[str]:
        return [one["id"] for one in self.call("ListPodSandbox").get("items", ())]

    def status(self, pod: str) -> dict[str, Any]:
        """PodSandboxStatus."""
        found = self.call("PodSandboxStatus", {"pod_sandbox_id": pod})["status"]
        assert isinstance(found, dict)
        return found


def _class(kind: descriptor.Descriptor) -> Any:
    return message_factory.GetMessageClass(kind)


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = _descriptor(Path(str(shutil.which("containerd"))))
    del file.dependency[:]
    del file.public_dependency[:]
    file.ClearField("options")
    for kind in file.message_type:
        _drop_options(kind)
    for service in file.service:
        for method in service.method:
            method.ClearField("options")
    for enum in file.enum_type:
        enum.ClearField("options")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _drop_options(kind: descriptor_pb2.DescriptorProto) -> None:
    if not kind.options.map_entry:
        kind.ClearField("options")
    for field in kind.field:
        field.ClearField("options")
    for nested in kind.nested_type:
        _drop_options(nested)


def _descriptor(program: Path) -> descriptor_pb2.FileDescriptorProto:
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in re.finditer(rb"\x1f\x8b\x08", data):
            try:
                raw = zlib.decompressobj(wbits=31).decompress(data[match.start() : match.start() + (1 << 21)])
            except zlib.error:
                continue  # three bytes that look like the beginning of gzip's format
            if raw.startswith(b"\x0a\x09api.proto") and PACKAGE.encode() in raw[:64]:
                found = descriptor_pb2.FileDescriptorProto.FromString(raw)
                if found.package == PACKAGE:
                    return found
    raise AssertionError(f"{program} has no descriptor of {PACKAGE}")
