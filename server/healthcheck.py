"""`python -m server.healthcheck`: exit status 0 if the server that the environment describes is ready.

For the health checks of containers. Imports nothing but the standard library: it runs every few seconds.
"""

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

TIMEOUT_S = 4.0


def is_ready(*, host: str, port: int, has_tls: bool) -> bool:
    """Whether the server answers `/ready` with 200; its certificate is not checked, since it is for another name."""
    if has_tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(
        not is_ready(
            host="127.0.0.1",
            port=int(os.environ.get("DIJIANG_PORT", "8000")),
            has_tls=bool(os.environ.get("DIJIANG_TLS_CERT")),
        )
    )
