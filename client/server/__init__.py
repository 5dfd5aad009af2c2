"""Starting, watching and stopping a `tritonserver`."""

from client.server.options import Addresses, ServerOptions
from client.server.process import Server
from client.server.server_log import Progress
from client.server.supervisor import Supervisor

__all__ = ["Addresses", "Progress", "Server", "ServerOptions", "Supervisor"]
