/* What ranks need of MPI. Handles and constants differ between Open MPI and MPICH, so they stay on this side.
 * An error in a call ends all ranks: that is MPI's default. */
#include <mpi.h>

/* Starts MPI. `place` gets rank and size, among all and among the ranks of this machine. Returns whether threads may
 * take turns in calling MPI. */
int hydra_mpi_start(int place[4]) {
    int level;
    MPI_Comm machine;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &place[0]);
    MPI_Comm_size(MPI_COMM_WORLD, &place[1]);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &place[2]);
    MPI_Comm_size(machine, &place[3]);
    MPI_Comm_free(&machine);
    return level >= MPI_THREAD_SERIALIZED;
}

void hydra_mpi_end(void) {
    MPI_Finalize();
}

void hydra_mpi_abort(int code) {
    MPI_Abort(MPI_COMM_WORLD, code);
}

void hydra_mpi_send(const void *bytes, int count, int to) {
    MPI_Send(bytes, count, MPI_BYTE, to, 0, MPI_COMM_WORLD);
}

void hydra_mpi_receive(void *bytes, int count, int from) {
    MPI_Recv(bytes, count, MPI_BYTE, from, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}

/* From rank 0. */
void hydra_mpi_broadcast(void *bytes, int count) {
    MPI_Bcast(bytes, count, MPI_BYTE, 0, MPI_COMM_WORLD);
}

/* `all` gets `count` bytes of each rank. */
void hydra_mpi_all_gather(const void *own, int count, void *all) {
    MPI_Allgather(own, count, MPI_BYTE, all, count, MPI_BYTE, MPI_COMM_WORLD);
}
