"""One POST to the shim's socket: call.py NAME JSON. Prints the answer."""

import http.client
import socket
import sys


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect("/run/docker/plugins/netloom.sock")


connection = _Connection("plugin")
connection.request("POST", f"/{sys.argv[1]}", body=sys.argv[2])
print(connection.getresponse().read().decode())
