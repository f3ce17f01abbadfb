"""What two peers of the swarm must agree on.

Admission rule: a thing lives here only if a client and a node would talk past each other when their copies of it
differed. Routing is the client's, placement the node's.
"""

__all__: list[str] = []
