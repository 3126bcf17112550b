"""`fedlora audit`: tries to break a scenario's epsilon, and says how far it got.

One run with canaries gives a lower bound on epsilon that holds with a stated confidence (Steinke, Nasr and
Jagielski, 2023, https://arxiv.org/abs/2305.08846). A bound above the claim proves the claim false. A bound
below it proves nothing: no attack of this kind got further.
"""

from fedlora.audit.run import Audit, audit

__all__ = ["Audit", "audit"]
