"""torchmetrics classes of the field: HR@K, NDCG@K, MRR, AUC, GAUC, NE."""
