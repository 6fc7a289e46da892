"""On PYTHONPATH this closes the network for a Python process and its children: a connection to another machine raises."""
import ipaddress, os, socket


def local(address):
    if not isinstance(address, tuple): return True                     # a Unix socket's path
    host = address[0]
    if isinstance(host, bytes): host = host.decode()
    if host in ('', 'localhost'): return True
    try: return ipaddress.ip_address(host.split('%')[0]).is_loopback or ipaddress.ip_address(host.split('%')[0]).is_unspecified
    except ValueError: return False                                    # a name: it would have to be looked up


def closed(method):
    def guarded(self, address, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local(address):
            raise OSError(f'the network is closed in tests: {method.__name__} to {address!r}')
        return method(self, address, *args)
    return guarded


def lookup(host, *args, _ask=socket.getaddrinfo, **kwargs):
    if host is not None and not local((host, 0)) and host != socket.gethostname():
        raise socket.gaierror(f'the network is closed in tests: look-up of {host!r}')
    return _ask(host, *args, **kwargs)


socket.getaddrinfo = lookup
for name in ('connect', 'connect_ex'): setattr(socket.socket, name, closed(getattr(socket.socket, name)))
os.environ['VITBOOK_OFFLINE_TEST'] = '1'                               # lets a test see that the guard was really loaded
