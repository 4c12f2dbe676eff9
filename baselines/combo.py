"""COMBO: conservative offline model-based policy optimisation (Yu et al., 2021, arXiv:2102.08363).

    python baselines/combo.py --env Walker2d-v4 --dataset runs/.../dataset.npz

CQL (cql.py) on a mix d_f of data, to a share f of `real_ratio`, and rollouts in a learned model (mopo.py), without a
penalty on uncertainty: what is imagined is pushed down, what is seen is pushed up (eq. 2),

    critic  E_(d_f) (Q_i(s, a) - y)^2 + beta (E_(s in d_f) log int exp Q_i(s, a') da' - E_(s, a in data) Q_i(s, a))

Details as in OfflineRL-Kit's run_combo.py: rho is the mix, critics and actor have three layers, no entropy in y.
Deviations: those of mopo.py's rollouts. Online as mopo.py.
"""

import sys

import common  # before cql: it puts the repository's root on the path
from cql import CQL, cql_arguments, cql_flags
from mopo import MOPO, imagination_arguments, model_flags


class COMBO(MOPO, CQL):
    """MOPO's batches (its imagination without a penalty), CQL's critics, whose alpha is COMBO's beta."""


def build_parser():
    parser = common.offline_parser(__doc__, "combo")
    cql_flags(parser, "COMBO", alpha=5.0)
    model_flags(parser, real_ratio=0.5)
    return parser


def check(args):
    common.require(round(args.real_ratio * args.batch_size) > 0,
                f"--real-ratio {args.real_ratio} leaves no data in a batch")


def make_agent(args, env):
    return COMBO(**cql_arguments(args, env), **imagination_arguments(args, env))


def main(argv=None):
    return common.main("combo", build_parser(), make_agent, argv, check, compiles=True)


if __name__ == "__main__":
    sys.exit(main())
