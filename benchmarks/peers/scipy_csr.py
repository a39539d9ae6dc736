"""scipy's CSR matrix times a dense one; one thread, whatever it is told."""

import scipy
import scipy.sparse
from worker import Peer, serve


class ScipyCSR(Peer):
    version = scipy.__version__

    def size(self, weight):
        return 8 * int((weight != 0).sum())

    def load(self, weight, factors, copies, threads):
        csr = scipy.sparse.csr_array(weight)
        self._copies = [csr] + [csr.copy() for _ in range(copies - 1)]
        return csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes

    def calls(self, x):
        columns = x[0] if len(x) == 1 else x.T.copy()
        return [lambda w=w: (w @ columns).T.reshape(len(x), -1) for w in self._copies]


serve(ScipyCSR())
