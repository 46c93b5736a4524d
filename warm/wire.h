/* What the launcher and the workers say to each other. docs/warm-protocol.md tells the rules; cni/wire.py holds the same
 * constants, and a test compares the two files. All numbers are in the byte order of the machine. */
#ifndef NETLOOM_WIRE_H
#define NETLOOM_WIRE_H

#define NETLOOM_MAGIC 0x314D4C4E /* "NLM1" on a little-endian machine */
#define NETLOOM_VERSION 1 /* what this side speaks */
#define NETLOOM_OLDEST 1 /* the oldest version that this side speaks too */

/* A frame: header, then fields. The header never changes, whatever the version:
 * u32 magic, u16 version, u16 oldest, u32 kind, u32 length of what follows. */
#define NETLOOM_HEADER_SIZE 16
/* A field: u16 tag, u16 flags, u32 length, then that many bytes. Unknown ones are passed over. */
#define NETLOOM_FIELD_SIZE 8
#define NETLOOM_FIELD_REQUIRED 1 /* flag: who does not know the tag must refuse the frame */

#define NETLOOM_STDIN_LIMIT 1048576 /* bytes of standard input; more is CNI error 6 */
#define NETLOOM_FRAME_LIMIT 2097152 /* bytes of a frame without its header; a longer request goes the cold way */

#define NETLOOM_KIND_REQUEST 1
#define NETLOOM_KIND_ACCEPTED 2
#define NETLOOM_KIND_REFUSED 3
#define NETLOOM_KIND_RESPONSE 4
#define NETLOOM_KIND_DONE 5

/* REQUEST */
#define NETLOOM_TAG_PROGRAM 1 /* last part of argv[0] */
#define NETLOOM_TAG_ENVIRONMENT 2 /* NAME=VALUE, each ended by NUL */
#define NETLOOM_TAG_UMASK 3 /* u32 */
#define NETLOOM_TAG_STDIN 4 /* absent: not read, as the verb needs none */
#define NETLOOM_TAG_PLACES 5 /* u64 device, u64 inode of: net, mnt, user namespace, root directory */
#define NETLOOM_TAG_DESCRIPTORS 6 /* u32: which descriptors came along, in the order of these bits */
#define NETLOOM_DESCRIPTOR_CWD 1
#define NETLOOM_DESCRIPTOR_NETNS 2
/* ACCEPTED */
#define NETLOOM_TAG_DEADLINE 16 /* u32 ms: when the worker gives up, counted from here */
/* REFUSED */
#define NETLOOM_TAG_REASON 17 /* text */
/* RESPONSE */
#define NETLOOM_TAG_STDOUT 18
#define NETLOOM_TAG_STDERR 19
#define NETLOOM_TAG_STATUS 20 /* u32: exit status */

#endif
