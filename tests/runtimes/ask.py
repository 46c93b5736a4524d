"""ask.py tcp|udp ADDRESS PORT LIMIT_S SOURCE: prints what a server says there, asked again until it does.

Exit 1 at the limit. SOURCE is the own port, 0 any. Over TCP it asks as a browser does and prints the body. Runs with
-I -S: only the standard library, no site packages.
"""

import socket
import sys
import time


def ask(protocol: str, address: str, port: int, source: int) -> bytes:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as asker:
        asker.settimeout(1)
        asker.bind(("", source))
        asker.connect((address, port))
        if protocol == "udp":
            asker.send(b"who?\n")
            return asker.recv(4096)
        asker.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while data := asker.recv(4096):
            answer += data
        return answer.partition(b"\r\n\r\n")[2]


def main() -> int:
    protocol, address, port, limit_s, source = sys.argv[1:]
    deadline = time.monotonic() + float(limit_s)
    while True:
        try:
            answer = ask(protocol, address, int(port), int(source))
        except OSError as error:
            answer, complaint = b"", str(error)
        else:
            complaint = "an empty answer"
        if answer:
            sys.stdout.write(answer.decode())
            return 0
        if time.monotonic() > deadline:
            sys.stderr.write(f"{complaint}\n")
            return 1
        time.sleep(0.02)


sys.exit(main())
