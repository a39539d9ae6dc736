"""torch.sparse: a CSR tensor times a dense one."""

import torch
from worker import Peer, serve


class TorchCSR(Peer):
    version = torch.__version__

    def size(self, weight):
        return 8 * int((weight != 0).sum())

    def load(self, weight, factors, copies, threads):
        torch.set_num_threads(threads)
        csr = torch.from_numpy(weight).to_sparse_csr()
        # 32-bit indices are what MKL computes with; 64-bit ones, torch's default, would be converted.
        parts = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
        self._copies = [
            torch.sparse_csr_tensor(*(part.clone() for part in parts), csr.shape) for _ in range(copies)
        ]
        return sum(part.nbytes for part in parts)

    def calls(self, x):
        columns = torch.from_numpy(x).T.contiguous()
        return [lambda w=w: (w @ columns).T for w in self._copies]


serve(TorchCSR())
