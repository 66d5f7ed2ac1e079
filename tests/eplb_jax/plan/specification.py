"""DeepSeek's balancer as plain loops: float32, stable descending order, the first of equal choices."""

import numpy as np


def pack(weight, packs):
    """Pack and position of each of one layer's items."""
    items = len(weight)
    capacity = items // packs
    if capacity == 1:
        return list(range(items)), [0] * items
    pack_of, position = [0] * items, [0] * items
    loads, held = [np.float32(0)] * packs, [0] * packs
    for item in sorted(range(items), key=lambda i: -weight[i]):
        chosen = min((p for p in range(packs) if held[p] < capacity), key=lambda p: loads[p])
        pack_of[item], position[item] = chosen, held[chosen]
        loads[chosen] += weight[item]
        held[chosen] += 1
    return pack_of, position


def replicate(weight, replicas):
    """Expert and rank of each replica, and replicas of each expert, of one layer."""
    experts = len(weight)
    expert_of, rank, count = list(range(experts)), [0] * experts, [1] * experts
    each = list(weight)
    for _ in range(replicas - experts):
        chosen = max(range(experts), key=lambda e: each[e])
        expert_of.append(chosen)
        rank.append(count[chosen])
        count[chosen] += 1
        each[chosen] = weight[chosen] / np.float32(count[chosen])
    return expert_of, rank, count


def rebalance(weight, replicas, groups, nodes, gpus):
    """phy2log, log2phy, logcnt of one layer; log2phy as a list of lists."""
    weight = np.asarray(weight, np.float32)
    if groups % nodes:
        groups = nodes = 1
    experts = len(weight)
    size = experts // groups
    group_load = []
    for group in weight.reshape(groups, size):
        total = np.float32(0)
        for load in group:
            total += load
        group_load.append(total)
    node_of, position = pack(group_load, nodes)
    expert_at = [0] * experts  # by the number within the nodes
    for group in range(groups):
        for i in range(size):
            place = (node_of[group] * (groups // nodes) + position[group]) * size + i
            expert_at[place] = group * size + i

    phy2log, log2phy, logcnt = [0] * replicas, [{} for _ in range(experts)], [0] * experts
    for node in range(nodes):
        local = expert_at[node * experts // nodes : (node + 1) * experts // nodes]
        expert_of, rank, count = replicate(weight[local], replicas // nodes)
        loads = [weight[local[e]] / np.float32(count[e]) for e in expert_of]
        gpu_of, slot = pack(loads, gpus // nodes)
        for replica, expert in enumerate(expert_of):
            place = node * (replicas // nodes) + gpu_of[replica] * (replicas // gpus) + slot[replica]
            phy2log[place] = local[expert]
            log2phy[local[expert]][rank[replica]] = place
            logcnt[local[expert]] = count[expert]
    return phy2log, [[slots[r] for r in range(len(slots))] for slots in log2phy], logcnt
